#pragma once
// Separable bilinear resampling by PyTorch's rule (half-pixel centres, align_corners=False), columns first.
//
// Columns are handled in an order of their own. Where the width grows by an integer factor, all outputs of
// one phase (columns r, r + factor, ...) stand together: then every load is contiguous. Elsewhere the order
// is the plain one.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/simd.h"

namespace errseg {
namespace {

/// For each output position of an axis, its two input positions and their weights.
template <typename S>
struct Axis {
    Axis(int64_t input, int64_t output)
        : in(input), out(output), low(output), high(output), low_weight(output), high_weight(output) {
        // The source coordinate (o + 1/2) in / out - 1/2 as an exact fraction of 2 out; floating-point
        // coordinates of float32 are off by 1e-6 on wide maps.
        const int64_t denominator = 2 * out;
        for (int64_t o = 0; o < out; ++o) {
            const int64_t numerator = std::max<int64_t>((2 * o + 1) * in - out, 0);
            low[o] = static_cast<int32_t>(numerator / denominator);
            high[o] = low[o] + (low[o] < in - 1);
            const double fraction =
                static_cast<double>(numerator % denominator) / static_cast<double>(denominator);
            high_weight[o] = static_cast<S>(fraction);
            low_weight[o] = static_cast<S>(1. - fraction);
        }
    }

    int64_t in, out;
    std::vector<int32_t> low, high;
    std::vector<S> low_weight, high_weight;
};

template <typename S>
ERRSEG_CLONES void expand_phase(const S* __restrict row, S weight, int64_t n, S* __restrict out) {
    for (int64_t x = 0; x < n; ++x) out[x] = row[x] + weight * (row[x + 1] - row[x]);
}

/// Outputs from `out` on, at most `kRun`, that lie between the inputs `in` and in + 1.
struct Run {
    int32_t in, out;
};
constexpr int64_t kRun = 8;

/// Every run is written at full length, which is quicker than gathers; what is too much is overwritten.
template <typename S>
ERRSEG_CLONES void expand_runs(const S* __restrict row, const Run* __restrict runs, int64_t count,
                               const S* __restrict weight, S* __restrict out) {
    for (int64_t r = 0; r < count; ++r) {
        const S from = row[runs[r].in], step = row[runs[r].in + 1] - from;
        const int32_t first = runs[r].out;
        for (int64_t q = 0; q < kRun; ++q) out[first + q] = from + weight[first + q] * step;
    }
}

template <typename S>
ERRSEG_CLONES void fold_phase(const S* __restrict in, const S* __restrict weight, int64_t n,
                              S* __restrict row) {
    for (int64_t x = 0; x < n; ++x) row[x] += weight[x] * in[x];
}

/// kFactor runs of n values, one after the other, to one value of each in turn.
template <int kFactor, typename T>
ERRSEG_CLONES void interleave(const T* __restrict runs, int64_t n, T* __restrict out) {
    for (int64_t x = 0; x < n; ++x)
        for (int r = 0; r < kFactor; ++r) out[x * kFactor + r] = runs[r * n + x];
}

/// The columns of a map, in the order described above.
template <typename S>
class Columns {
  public:
    Columns(int64_t input, int64_t output)
        : axis_(input, output), factor_(output % input ? 0 : output / input) {
        if (factor_) {
            const Axis<S> plain = axis_;
            arrange(plain.low_weight.data(), axis_.low_weight.data());
            arrange(plain.high_weight.data(), axis_.high_weight.data());
            return;
        }
        for (int32_t o = 0; o < output; ++o)
            if (runs_.empty() || axis_.low[o] != runs_.back().in || o - runs_.back().out == kRun)
                runs_.push_back({axis_.low[o], o});
        axis_.high_weight.resize(output + kRun);
    }

    int64_t in() const { return axis_.in; }
    int64_t out() const { return axis_.out; }

    /// Elements that `expand` may write.
    int64_t room() const { return factor_ ? out() : out() + kRun - 1; }

    /// Values that `expand` and `fold` want in front of and behind a row.
    static constexpr int64_t kPadding = 1;

    /// Brings values from the order to plain columns.
    template <typename T>
    void restore(const T* ordered, T* plain) const {
        if (!factor_) {
            std::copy_n(ordered, out(), plain);
        } else if (factor_ == 4) {  // from a quarter of the image to the image
            interleave<4>(ordered, axis_.in, plain);
        } else {
            for (int64_t x = 0; x < axis_.in; ++x)
                for (int64_t r = 0; r < factor_; ++r) plain[x * factor_ + r] = ordered[r * axis_.in + x];
        }
    }

    /// The way back: plain columns to the order.
    template <typename T>
    void arrange(const T* plain, T* ordered) const {
        if (!factor_) {
            std::copy_n(plain, out(), ordered);
            return;
        }
        for (int64_t x = 0; x < axis_.in; ++x)
            for (int64_t r = 0; r < factor_; ++r) ordered[r * axis_.in + x] = plain[x * factor_ + r];
    }

    /// Input row -> output row of `room()` elements. Overwrites the padding of `row`.
    void expand(S* row, S* expanded) const {
        row[-1] = row[0];
        row[in()] = row[in() - 1];
        if (!factor_) {
            expand_runs(row, runs_.data(), static_cast<int64_t>(runs_.size()), axis_.high_weight.data(),
                        expanded);
            return;
        }
        for (int64_t r = 0; r < factor_; ++r) {
            const S weight = S((2 * r + 1 + factor_) % (2 * factor_)) / S(2 * factor_);
            expand_phase(row + offset(r), weight, in(), expanded + r * in());
        }
    }

    /// The transpose of `expand`: output row -> input row, summed in a fixed order. Overwrites row and
    /// padding.
    void fold(const S* expanded, S* row) const {
        std::fill(row - 1, row + in() + 1, S(0));
        if (!factor_) {
            for (int64_t q = 0; q < out(); ++q) {
                row[axis_.low[q]] += axis_.low_weight[q] * expanded[q];
                row[axis_.high[q]] += axis_.high_weight[q] * expanded[q];
            }
            return;
        }
        for (int64_t r = 0; r < factor_; ++r) {
            const int64_t start = r * in();
            fold_phase(expanded + start, &axis_.low_weight[start], in(), row + offset(r));
            fold_phase(expanded + start, &axis_.high_weight[start], in(), row + offset(r) + 1);
        }
        row[0] += row[-1];
        row[in() - 1] += row[in()];
    }

  private:
    /// The first half of the phases looks at the column before.
    int64_t offset(int64_t phase) const { return 2 * phase + 1 < factor_ ? -1 : 0; }

    Axis<S> axis_;
    int64_t factor_;  // 0: no phases
    std::vector<Run> runs_;
};

/// Output rows [begin, end) between the same two input rows.
struct RowGroup {
    int64_t low, high, begin, end;
};

template <typename S>
std::vector<RowGroup> row_groups(const Axis<S>& rows) {
    std::vector<RowGroup> groups;
    for (int64_t o = 0; o < rows.out; ++o) {
        if (groups.empty() || groups.back().low != rows.low[o])
            groups.push_back({rows.low[o], rows.high[o], o, o});
        groups.back().end = o + 1;
    }
    return groups;
}

/// Which two buffers hold which input rows, while output rows go by from top to bottom.
class TwoRows {
  public:
    /// Points `low` and `high` at the buffers of a group's rows; calls `leave(slot, row)` for a row that is
    /// not wanted any more and `enter(slot, row)` for one that was not there.
    template <typename Leave, typename Enter>
    void move_to(const RowGroup& group, const Leave& leave, const Enter& enter) {
        for (int slot : {0, 1})
            if (rows_[slot] >= 0 && rows_[slot] != group.low && rows_[slot] != group.high) {
                leave(slot, rows_[slot]);
                rows_[slot] = -1;
            }
        low = slot_of(group.low, enter);
        high = slot_of(group.high, enter);
    }

    /// Calls `leave` for what is left.
    template <typename Leave>
    void finish(const Leave& leave) {
        for (int slot : {0, 1})
            if (rows_[slot] >= 0) leave(slot, rows_[slot]);
    }

    int low = 0, high = 0;

  private:
    template <typename Enter>
    int slot_of(int64_t row, const Enter& enter) {
        for (int slot : {0, 1})
            if (rows_[slot] == row) return slot;
        const int slot = rows_[0] < 0 ? 0 : 1;
        rows_[slot] = row;
        enter(slot, row);
        return slot;
    }

    int64_t rows_[2] = {-1, -1};
};

}  // namespace
}  // namespace errseg
