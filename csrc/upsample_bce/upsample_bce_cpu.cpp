// Binary cross-entropy of upsampled logits and its gradient in one pass over the target's pixels.
//
// One task per class and image: expand two source rows, take loss and slope at each output row between them,
// gather the slopes back into two expanded rows, fold those to the low resolution. Every sum has a fixed
// order, whatever the number of threads is.
#include <atomic>
#include <cmath>

#include "common/bilinear.h"
#include "common/stable.h"

namespace errseg {
namespace {

constexpr double kMissedCost = 100.;  // softplus of minus the logit -100 that an unselected class stands for
constexpr int32_t kNotSelected = -1, kIgnored = -2;

template <typename S>
struct LossAndSlope {
    S loss, slope;  // softplus(x), sigmoid(x)
};

ERRSEG_INLINE LossAndSlope<float> softplus(float x) {
    const float e = exp_nonpositive(-std::fabs(x));
    const float reciprocal = 1.f / ((1.f + e) * (2.f + e));
    const float s = e * (1.f + e) * reciprocal, z = s * s;  // log(1 + e) = 2 artanh(e / (2 + e))
    float series = z * (1.f / 13.f) + 1.f / 11.f;
    series = z * series + 1.f / 9.f;
    series = z * series + 1.f / 7.f;
    series = z * series + 1.f / 5.f;
    series = z * series + 1.f / 3.f;
    const float log1p = 2.f * s + 2.f * s * (z * series);
    // One condition on x alone: gcc would branch on two of a kind, and then not vectorise.
    return {.5f * x + .5f * std::fabs(x) + log1p, (2.f + e) * reciprocal * (x < 0.f ? e : 1.f)};
}
inline LossAndSlope<double> softplus(double x) {
    const double e = std::exp(-std::fabs(x)), p = 1. / (1. + e);
    return {.5 * x + .5 * std::fabs(x) + std::log1p(e), p * (x < 0. ? e : 1.)};
}

/// Loss of one output row; with kTrain also the slopes, gathered into the two expanded rows.
template <typename S, bool kTrain>
ERRSEG_CLONES double row_loss(const S* __restrict a, const S* __restrict b, S wa, S wb,
                              const int32_t* __restrict target, int32_t k, S ignored, int64_t n,
                              S* __restrict grad_a, S* __restrict grad_b) {
    double total = 0.;
#pragma omp simd reduction(+ : total)
    for (int64_t q = 0; q < n; ++q) {
        const S x = wa * a[q] + wb * b[q];
        const LossAndSlope<S> at = softplus(x);
        const S positive = target[q] == k ? S(1) : S(0), share = target[q] == kIgnored ? ignored : S(1);
        const S loss = share * (at.loss - positive * x), slope = share * (at.slope - positive);
        total += static_cast<double>(loss);
        if (kTrain) {
            grad_a[q] += wa * slope;
            grad_b[q] += wb * slope;
        }
    }
    return total;
}

/// What every plane shares.
template <typename S>
struct Problem {
    const Tensor& logits;
    const Reader<S> read;
    const Axis<S>& rows;
    const Columns<S>& columns;
    const std::vector<RowGroup>& groups;
    S ignored;  // share of the ignored pixels in the loss: 0 or 1
    S scale;    // of the gradient
};

/// One class of one image.
template <typename S, bool kTrain>
class Plane {
  public:
    explicit Plane(const Problem<S>& problem)
        : p_(problem), row_(problem.columns.in() + 2 * Columns<S>::kPadding) {
        for (auto& buffer : expanded_) buffer.resize(p_.columns.room());
        for (auto& buffer : slopes_) buffer.resize(kTrain ? p_.columns.out() : 0);
    }

    /// Sum of the losses of the plane that begins at `start`; writes its gradient.
    double run(int64_t start, const int32_t* target, int32_t k, S* gradient) {
        const int64_t width = p_.columns.in();
        S* row = row_.data() + Columns<S>::kPadding;
        if (kTrain) std::fill_n(gradient, p_.rows.in * width, S(0));
        const auto leave = [&](int slot, int64_t y) {
            if (!kTrain) return;
            p_.columns.fold(slopes_[slot].data(), row);
            for (int64_t x = 0; x < width; ++x) gradient[y * width + x] = p_.scale * row[x];
        };
        const auto enter = [&](int slot, int64_t y) {
            p_.read(p_.logits, start + y * width, width, row);
            p_.columns.expand(row, expanded_[slot].data());
            std::fill(slopes_[slot].begin(), slopes_[slot].end(), S(0));
        };
        TwoRows slots;
        double total = 0.;
        for (const RowGroup& group : p_.groups) {
            slots.move_to(group, leave, enter);
            total += group_loss(group, slots, target, k);
        }
        slots.finish(leave);
        return total;
    }

  private:
    double group_loss(const RowGroup& group, const TwoRows& slots, const int32_t* target, int32_t k) {
        const bool one_row = slots.low == slots.high;  // at the lower edge
        const S *a = expanded_[slots.low].data(), *b = expanded_[slots.high].data();
        S *grad_a = slopes_[slots.low].data(), *grad_b = slopes_[one_row ? 2 : slots.high].data();
        double total = 0.;
        for (int64_t o = group.begin; o < group.end; ++o) {
            const S wa = one_row ? S(1) : p_.rows.low_weight[o], wb = one_row ? S(0) : p_.rows.high_weight[o];
            const int64_t width = p_.columns.out();
            total +=
                row_loss<S, kTrain>(a, b, wa, wb, target + o * width, k, p_.ignored, width, grad_a, grad_b);
        }
        return total;
    }

    const Problem<S>& p_;
    std::vector<S> row_, expanded_[2], slopes_[3];  // the third takes what has no row of its own
};

/// Per pixel the position of its class among the selected ones, in the order of `columns`; and two counts.
struct Positions {
    std::vector<int32_t> map;
    int64_t missed = 0, valid = 0;
};

template <typename S>
Positions find_positions(const Tensor& class_ids, const Tensor& target, int64_t vocabulary_size,
                         int64_t ignore_index, const Columns<S>& columns) {
    const int64_t batch = class_ids.size(0), num_classes = class_ids.size(1), height = target.size(1),
                  width = target.size(2);
    std::vector<int32_t> lookup(batch * vocabulary_size, kNotSelected);
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t k = 0; k < num_classes; ++k) {
            const int64_t id = data<int64_t>(class_ids)[b * num_classes + k];
            if (0 <= id && id < vocabulary_size) lookup[b * vocabulary_size + id] = static_cast<int32_t>(k);
        }
    Positions found;
    found.map.resize(batch * height * width);
    std::atomic<int64_t> missed{0}, valid{0};
    visit_integer(target, "target", [&](auto tag) {
        using I = typename decltype(tag)::type;
        torch::stable::parallel_for(0, batch * height, 16, [&](int64_t begin, int64_t end) {
            int64_t num_missed = 0, num_valid = 0;
            std::vector<int32_t> plain(width);
            for (int64_t row = begin; row < end; ++row) {
                const I* values = data<I>(target) + row * width;
                const int32_t* of_image = &lookup[row / height * vocabulary_size];
                for (int64_t x = 0; x < width; ++x) {
                    const int64_t id = static_cast<int64_t>(values[x]);
                    const bool known = id != ignore_index && 0 <= id && id < vocabulary_size;
                    const int32_t position = known ? of_image[id] : kIgnored;
                    num_valid += known;
                    num_missed += position == kNotSelected;
                    plain[x] = position;
                }
                columns.arrange(plain.data(), &found.map[row * width]);
            }
            missed += num_missed;
            valid += num_valid;
        });
    });
    found.missed = missed;
    found.valid = valid;
    return found;
}

template <typename S, bool kTrain>
double sum_planes(const Problem<S>& problem, const std::vector<int32_t>& positions, S* gradient) {
    const int64_t num_classes = problem.logits.size(1), planes = problem.logits.size(0) * num_classes;
    const int64_t low = problem.rows.in * problem.columns.in(),
                  high = problem.rows.out * problem.columns.out();
    std::vector<double> sums(planes);
    torch::stable::parallel_for(0, planes, 1, [&](int64_t begin, int64_t end) {
        Plane<S, kTrain> plane(problem);
        for (int64_t i = begin; i < end; ++i)
            sums[i] = plane.run(i * low, &positions[i / num_classes * high],
                                static_cast<int32_t>(i % num_classes), kTrain ? gradient + i * low : nullptr);
    });
    double total = 0.;
    for (double sum : sums) total += sum;
    return total;
}

std::tuple<Tensor, Tensor> upsample_bce_cpu(const Tensor& logits_in, const Tensor& class_ids_in,
                                            const Tensor& target_in, int64_t vocabulary_size,
                                            int64_t ignore_index, bool exclude_ignored, bool training) {
    const Tensor logits = as_contiguous(logits_in), class_ids = as_contiguous(class_ids_in),
                 target = as_contiguous(target_in);
    expect(logits.dim() == 4, "logits [B, K, h, w]", logits);
    const int64_t batch = logits.size(0), num_classes = logits.size(1), h = logits.size(2),
                  w = logits.size(3);
    expect(batch == 0 || h * w > 0, "logits of at least 1 x 1", logits);
    expect(class_ids.dim() == 2 && class_ids.size(0) == batch && class_ids.size(1) == num_classes &&
               class_ids.scalar_type() == ScalarType::Long,
           "class_ids [B, K] int64", class_ids);
    expect(target.dim() == 3 && target.size(0) == batch, "target [B, H, W]", target);
    STD_TORCH_CHECK(vocabulary_size >= 0, "expected a vocabulary_size of at least 0, got ", vocabulary_size);
    const ScalarType dtype = score_dtype(logits);
    Tensor loss = empty(logits, {}, dtype);
    Tensor gradient = training ? empty(logits, {batch, num_classes, h, w}, dtype) : empty(logits, {0}, dtype);
    visit_score(logits, [&](auto tag) {
        using S = typename decltype(tag)::type;
        if (target.numel() == 0) {
            if (training) torch::stable::zero_(gradient);
            *mutable_data<S>(loss) = S(0);
            return;
        }
        const Axis<S> rows(h, target.size(1));
        const Columns<S> columns(w, target.size(2));
        const std::vector<RowGroup> groups = row_groups(rows);
        const Positions found = find_positions(class_ids, target, vocabulary_size, ignore_index, columns);
        const int64_t counted = exclude_ignored ? std::max<int64_t>(found.valid, 1) : target.numel();
        const double elements = static_cast<double>(counted) * static_cast<double>(vocabulary_size);
        const Problem<S> problem{logits,
                                 reader<S>(logits, "logits"),
                                 rows,
                                 columns,
                                 groups,
                                 exclude_ignored ? S(0) : S(1),
                                 static_cast<S>(1. / elements)};
        const double selected = training ? sum_planes<S, true>(problem, found.map, mutable_data<S>(gradient))
                                         : sum_planes<S, false>(problem, found.map, nullptr);
        *mutable_data<S>(loss) =
            static_cast<S>((selected + kMissedCost * static_cast<double>(found.missed)) / elements);
    });
    return {loss, gradient};
}

}  // namespace
}  // namespace errseg

STABLE_TORCH_LIBRARY_IMPL(errseg, CPU, m) {
    m.impl("upsample_bce_cpu", TORCH_BOX(&errseg::upsample_bce_cpu));
}
