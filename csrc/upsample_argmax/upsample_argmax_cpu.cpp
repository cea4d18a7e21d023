// Label maps: sigmoid at low resolution, bilinear, running maximum over the classes by ascending id.
//
// A source row is expanded to the output's width once per class; each output row between two source rows then
// blends the two expanded rows. Memory per thread: two expanded rows per class and one group of output rows.
#include <cmath>
#include <numeric>

#include "common/bilinear.h"
#include "common/stable.h"

namespace errseg {
namespace {

constexpr int64_t kStateBytes =
    24 << 10;  // of scores and labels at a time, so that they stay in the first cache

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

/// One class on one piece of a row: a strict comparison leaves ties to the lower id, and both functions round
/// alike.
template <typename S>
ERRSEG_CLONES ERRSEG_NO_CONTRACTION void update(const S* __restrict a, const S* __restrict b, S wa, S wb,
                                                int32_t id, int64_t n, S* __restrict score,
                                                int32_t* __restrict label) {
    ERRSEG_NO_CONTRACTION_HERE
    for (int64_t q = 0; q < n; ++q) {
        const S p = wa * a[q] + wb * b[q];
        const bool better = p > score[q];
        score[q] = better ? p : score[q];
        label[q] = better ? id : label[q];
    }
}

/// Four classes at once, which loads and stores the state a quarter as often.
template <typename S>
ERRSEG_CLONES ERRSEG_NO_CONTRACTION void update4(const S* __restrict a, const S* __restrict b, int64_t stride,
                                                 S wa, S wb, const int32_t* ids, int64_t n,
                                                 S* __restrict score, int32_t* __restrict label) {
    ERRSEG_NO_CONTRACTION_HERE
    const S *a1 = a + stride, *a2 = a1 + stride, *a3 = a2 + stride;
    const S *b1 = b + stride, *b2 = b1 + stride, *b3 = b2 + stride;
    const int32_t i0 = ids[0], i1 = ids[1], i2 = ids[2], i3 = ids[3];
#pragma omp simd
    for (int64_t q = 0; q < n; ++q) {
        const S p0 = wa * a[q] + wb * b[q], p1 = wa * a1[q] + wb * b1[q];
        const S p2 = wa * a2[q] + wb * b2[q], p3 = wa * a3[q] + wb * b3[q];
        const S p01 = p1 > p0 ? p1 : p0, p23 = p3 > p2 ? p3 : p2;
        const int32_t i01 = p1 > p0 ? i1 : i0, i23 = p3 > p2 ? i3 : i2;
        const S p = p23 > p01 ? p23 : p01;
        const int32_t i = p23 > p01 ? i23 : i01;
        const bool better = p > score[q];
        score[q] = better ? p : score[q];
        label[q] = better ? i : label[q];
    }
}

/// The map of one image.
template <typename S>
struct LabelMap {
    const Tensor& logits;  // [B, K, h, w]
    const Reader<S> read;
    const int64_t image;                // where its logits start
    const std::vector<int64_t>& order;  // positions of the classes by ascending id
    const std::vector<int32_t>& ids;    // ids in that order
    const Axis<S>& rows;
    const Columns<S>& columns;
    int32_t* labels;  // [H, W]
    S* scores;

    void run(const RowGroup* group, const RowGroup* end) const {
        const int64_t width = columns.out(), num_classes = static_cast<int64_t>(ids.size());
        std::vector<S> expanded(2 * num_classes * width), source(columns.in() + 2 * Columns<S>::kPadding);
        TwoRows slots;
        for (; group != end; ++group) {
            slots.move_to(
                *group, [](int, int64_t) {},
                [&](int slot, int64_t y) {
                    S* row = source.data() + Columns<S>::kPadding;
                    for (int64_t k = 0; k < num_classes; ++k) {
                        read(logits, image + (order[k] * rows.in + y) * columns.in(), columns.in(), row);
                        to_probabilities(row, columns.in());
                        columns.expand(row, &expanded[(slot * num_classes + k) * width]);
                    }
                });
            write(*group, &expanded[slots.low * num_classes * width],
                  &expanded[slots.high * num_classes * width]);
        }
    }

  private:
    void write(const RowGroup& group, const S* low, const S* high) const {
        const int64_t width = columns.out(), height = group.end - group.begin;
        const int64_t num_classes = static_cast<int64_t>(ids.size()), in_fours = num_classes / 4 * 4;
        const int64_t bytes = height * static_cast<int64_t>(sizeof(S) + sizeof(int32_t));
        const int64_t piece = std::max<int64_t>(64, kStateBytes / bytes / 64 * 64);
        std::vector<S> score(height * width, S(-1));
        std::vector<int32_t> label(height * width, ids[0]);
        for (int64_t q = 0; q < width; q += piece) {
            const int64_t n = std::min(piece, width - q);
            for (int64_t k = 0; k < num_classes; k += k < in_fours ? 4 : 1) {
                const S *a = low + k * width + q, *b = high + k * width + q;
                for (int64_t y = 0; y < height; ++y) {
                    const S wa = rows.low_weight[group.begin + y], wb = rows.high_weight[group.begin + y];
                    S* s = &score[y * width + q];
                    int32_t* l = &label[y * width + q];
                    if (k < in_fours)
                        update4(a, b, width, wa, wb, &ids[k], n, s, l);
                    else
                        update(a, b, wa, wb, ids[k], n, s, l);
                }
            }
        }
        for (int64_t y = 0; y < height; ++y) {
            columns.restore(&score[y * width], scores + (group.begin + y) * width);
            columns.restore(&label[y * width], labels + (group.begin + y) * width);
        }
    }
};

std::tuple<Tensor, Tensor> upsample_argmax_cpu(const Tensor& logits_in, const Tensor& class_ids_in,
                                               int64_t height, int64_t width) {
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
    Tensor scores = empty(logits, {batch, height, width}, score_dtype(logits));
    if (batch == 0) return {labels, scores};

    std::vector<std::vector<int64_t>> orders(batch, std::vector<int64_t>(num_classes));
    std::vector<std::vector<int32_t>> ids(batch, std::vector<int32_t>(num_classes));
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
                                      mutable_data<S>(scores) + b * height * width};
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
