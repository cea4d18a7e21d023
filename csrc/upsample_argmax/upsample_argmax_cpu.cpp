// Label maps: sigmoid at low resolution, bilinear, running maximum over the classes by ascending id.
//
// A source row is expanded to the output's width once per class; the output rows between two source rows, four at a
// time, then blend the two expanded rows. Memory per thread: two expanded rows per class and four output rows.
#include <cmath>
#include <numeric>

#include "common/bilinear.h"
#include "common/stable.h"

namespace errseg {
namespace {

constexpr int64_t kRows = 4, kClasses = 4;  // what one pass over a piece of the columns handles
constexpr int64_t kPiece = 640;             // the piece's scores and labels stay in the first cache
constexpr int64_t kLanes = 16;              // rows are padded to whole vectors

constexpr int64_t round_up(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

ERRSEG_INLINE float sigmoid(float x) {
    const float e = exp_nonpositive(-std::fabs(x));
    const float p = 1.f / (1.f + e);
    return x < 0.f ? e * p : p;
}
inline double sigmoid(double x) {
    return 1. / (1. + std::exp(-x));
}

template <typename S>
ERRSEG_CLONES void to_probabilities(S* row, int64_t n) {
    for (int64_t x = 0; x < n; ++x) row[x] = sigmoid(row[x]);
}

/// Four classes on one piece of `kHeight` output rows, from the two expanded rows around them. A strict comparison
/// leaves ties to the lower id; `from + weight * step` can be contracted in one way only, so equal maps stay equal.
template <int kHeight, typename S>
ERRSEG_CLONES void update(const S* __restrict low, const S* __restrict high, int64_t stride, const S* weights,
                          const int32_t* ids, int64_t n, S* __restrict score, int32_t* __restrict label) {
    const S *low1 = low + stride, *low2 = low1 + stride, *low3 = low2 + stride;
    const S *high1 = high + stride, *high2 = high1 + stride, *high3 = high2 + stride;
    const int32_t id0 = ids[0], id1 = ids[1], id2 = ids[2], id3 = ids[3];
    const S w0 = weights[0], w1 = weights[std::min(1, kHeight - 1)];
    const S w2 = weights[std::min(2, kHeight - 1)], w3 = weights[std::min(3, kHeight - 1)];
#pragma omp simd
    for (int64_t q = 0; q < n; ++q) {
        const S from0 = low[q], from1 = low1[q], from2 = low2[q], from3 = low3[q];
        const S step0 = high[q] - from0, step1 = high1[q] - from1;
        const S step2 = high2[q] - from2, step3 = high3[q] - from3;
        const auto offer_to_row = [&](S weight, int64_t at) __attribute__((always_inline)) {
            S best = score[at];
            int32_t winner = label[at];
            const auto offer = [&](S p, int32_t id) __attribute__((always_inline)) {
                winner = p > best ? id : winner;
                best = p > best ? p : best;
            };
            offer(from0 + weight * step0, id0);
            offer(from1 + weight * step1, id1);
            offer(from2 + weight * step2, id2);
            offer(from3 + weight * step3, id3);
            score[at] = best;
            label[at] = winner;
        };
        offer_to_row(w0, q);
        if constexpr (kHeight > 1) offer_to_row(w1, q + stride);
        if constexpr (kHeight > 2) offer_to_row(w2, q + 2 * stride);
        if constexpr (kHeight > 3) offer_to_row(w3, q + 3 * stride);
    }
}

/// The map of one image.
template <typename S>
struct LabelMap {
    const Tensor& logits;  // [B, K, h, w]
    const Reader<S> read;
    const int64_t image;                // where its logits start
    const std::vector<int64_t>& order;  // positions of the classes by ascending id
    const std::vector<int32_t>& ids;    // ids in that order, and more to a multiple of kClasses
    const Axis<S>& rows;
    const Columns<S>& columns;
    int32_t* labels;  // [H, W]
    S* scores;        // [H, W] or null

    void run(const RowGroup* group, const RowGroup* end) const {
        const int64_t stride = round_up(columns.room(), kLanes), slot_size = ids.size() * stride;
        // Less than any probability: columns and classes beyond the last never win.
        std::vector<S> expanded(2 * slot_size, S(-1));
        std::vector<S> source(columns.in() + 2 * Columns<S>::kPadding), score(kRows * stride);
        std::vector<int32_t> label(kRows * stride);
        TwoRows slots;
        for (; group != end; ++group) {
            slots.move_to(
                *group, [](int, int64_t) {},
                [&](int slot, int64_t y) {
                    expand(y, source.data() + Columns<S>::kPadding, &expanded[slot * slot_size], stride);
                });
            const S *low = &expanded[slots.low * slot_size], *high = &expanded[slots.high * slot_size];
            for (int64_t y = group->begin; y < group->end; y += kRows)
                write(y, std::min(kRows, group->end - y), low, high, stride, score.data(), label.data());
        }
    }

  private:
    /// The probabilities of input row `y`, every class expanded to the output's width.
    void expand(int64_t y, S* row, S* expanded, int64_t stride) const {
        const int64_t width = columns.in();
        for (const int64_t k : order) {
            const int64_t start = image + (k * rows.in + y) * width;
            read(logits, start, width, row);
            if (y + 1 < rows.in) prefetch(logits, start + width, width);  // too many streams to be foreseen
            to_probabilities(row, width);
            columns.expand(row, expanded);
            expanded += stride;
        }
    }

    /// Output rows [y, y + height) between two input rows.
    void write(int64_t y, int64_t height, const S* low, const S* high, int64_t stride, S* score,
               int32_t* label) const {
        constexpr decltype(&update<1, S>) updates[] = {update<1, S>, update<2, S>, update<3, S>,
                                                       update<4, S>};
        const auto update_rows = updates[height - 1];
        std::fill_n(score, height * stride, S(-1));
        std::fill_n(label, height * stride, ids[0]);
        for (int64_t q = 0; q < stride; q += kPiece)
            for (size_t k = 0; k < ids.size(); k += kClasses)
                update_rows(low + k * stride + q, high + k * stride + q, stride, &rows.high_weight[y],
                            &ids[k], std::min(kPiece, stride - q), score + q, label + q);
        for (int64_t r = 0; r < height; ++r) {
            columns.restore(label + r * stride, labels + (y + r) * columns.out());
            if (scores) columns.restore(score + r * stride, scores + (y + r) * columns.out());
        }
    }
};

std::tuple<Tensor, Tensor> upsample_argmax_cpu(const Tensor& logits_in, const Tensor& class_ids_in,
                                               int64_t height, int64_t width, bool return_scores) {
    const Tensor logits = as_contiguous(logits_in), class_ids = as_contiguous(class_ids_in);
    expect(logits.dim() == 4 && logits.size(1) > 0, "logits [B, K, h, w] of at least one class", logits);
    const int64_t batch = logits.size(0), num_classes = logits.size(1), h = logits.size(2),
                  w = logits.size(3);
    expect(batch == 0 || h * w > 0, "logits of at least 1 x 1", logits);
    expect(class_ids.dim() == 2 && class_ids.size(0) == batch && class_ids.size(1) == num_classes &&
               class_ids.scalar_type() == ScalarType::Long,
           "class_ids [B, K] int64", class_ids);
    STD_TORCH_CHECK(height > 0 && width > 0, "expected a size of at least 1 x 1, got ", height, " x ", width);
    Tensor labels = empty(logits, {batch, height, width}, ScalarType::Int);
    Tensor scores = return_scores ? empty(logits, {batch, height, width}, score_dtype(logits))
                                  : empty(logits, {0}, score_dtype(logits));
    if (batch == 0) return {labels, scores};

    std::vector<std::vector<int64_t>> orders(batch, std::vector<int64_t>(num_classes));
    std::vector<std::vector<int32_t>> ids(batch, std::vector<int32_t>(round_up(num_classes, kClasses)));
    for (int64_t b = 0; b < batch; ++b) {
        const int64_t* of_image = data<int64_t>(class_ids) + b * num_classes;
        std::iota(orders[b].begin(), orders[b].end(), 0);
        std::stable_sort(orders[b].begin(), orders[b].end(),
                         [=](int64_t i, int64_t j) { return of_image[i] < of_image[j]; });
        for (int64_t k = 0; k < num_classes; ++k) ids[b][k] = static_cast<int32_t>(of_image[orders[b][k]]);
    }
    visit_score(logits, [&](auto tag) {
        using S = typename decltype(tag)::type;
        const Reader<S> read = reader<S>(logits, "logits");
        const Axis<S> rows(h, height);
        const Columns<S> columns(w, width);
        const std::vector<RowGroup> groups = row_groups(rows);
        const int64_t per_image = static_cast<int64_t>(groups.size());
        torch::stable::parallel_for(0, batch * per_image, 1, [&](int64_t begin, int64_t end) {
            for (int64_t b = begin / per_image; b * per_image < end; ++b) {
                const LabelMap<S> map{logits,
                                      read,
                                      b * num_classes * h * w,
                                      orders[b],
                                      ids[b],
                                      rows,
                                      columns,
                                      mutable_data<int32_t>(labels) + b * height * width,
                                      return_scores ? mutable_data<S>(scores) + b * height * width : nullptr};
                const int64_t first = b * per_image;
                map.run(&groups[0] + std::max(begin - first, int64_t{0}),
                        &groups[0] + std::min(end - first, per_image));
            }
        });
    });
    return {labels, scores};
}

}  // namespace
}  // namespace errseg

STABLE_TORCH_LIBRARY_IMPL(errseg, CPU, m) {
    m.impl("upsample_argmax_cpu", TORCH_BOX(&errseg::upsample_argmax_cpu));
}
