#pragma once
// Attention of a tile of queries, one head at a time: all of its scores stand in cache.
#include "common/panels.h"

namespace errseg {

/// Queries at a time, so many that their scores fit half a second cache.
inline int64_t queries_of_a_tile(int64_t keys) {
    return std::clamp<int64_t>(65536 / padded(keys) / 8 * 8, 8, 64);
}

/// Heads of `rows` tokens, from `first` on out of all, as right factors [width, all] of scores.
template <typename S, typename E>
void transpose_heads(Tile<S> tokens, const Heads& heads, int64_t first, int64_t rows,
                     std::vector<Factor<E>>& to) {
    for (int64_t head = 0; head < heads.count; ++head) {
        const Tile<S> from = tokens.from_panel(head * heads.panels());
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t d = 0; d < heads.width; ++d)
                to[head].at(d, first + row) = narrow<E>(from.panel(d / kPanel)[row * kPanel + d % kPanel]);
        for (int64_t pad = first + rows; pad < padded(pad); ++pad)
            for (int64_t d = 0; d < heads.width; ++d) to[head].at(d, pad) = E(0);
    }
}

/// The same as right factors [all, width] of mixtures.
template <typename S, typename E>
void place_heads(Tile<S> tokens, const Heads& heads, int64_t first, int64_t rows,
                 std::vector<Factor<E>>& to) {
    for (int64_t head = 0; head < heads.count; ++head)
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t d = 0; d < padded(heads.width); ++d)
                to[head].at(first + row, d) =
                    narrow<E>(tokens.panel(head * heads.panels() + d / kPanel)[row * kPanel + d % kPanel]);
}

/// Rows of numbers, head by head, as a row of a tile where every head begins a panel.
template <typename K, typename T, typename S>
void load_heads(const K& kernels, const T* row, const Heads& heads, S scale, Tile<S> to) {
    for (int64_t head = 0; head < heads.count; ++head)
        kernels.load(row + head * heads.width, heads.width, scale, to.from_panel(head * heads.panels()));
}

/// Scores of the tile `queries`, softmax, mixture of values.
template <typename T, typename E>
class Attention {
  public:
    using S = Computed<T>;

    Attention(const Heads& heads, int64_t keys, int64_t rows, const Kernels<T, E>& kernels)
        : kernels_(kernels),
          heads_(heads),
          keys_(keys),
          scale_(static_cast<S>(1. / std::sqrt(static_cast<double>(heads.width)))),
          mask_(kPanel),
          inverse_(rows),
          scores_(rows, keys) {
        if constexpr (!std::is_same_v<S, E>) probabilities_ = OwnTile<E>(rows, keys);
        for (int64_t i = 0; i < kPanel; ++i)
            mask_.data()[i] =
                keys % kPanel && i >= keys % kPanel ? -std::numeric_limits<S>::infinity() : S(0);
    }

    /// mixture [rows, width] of a head; log_sums [rows].
    void run(Tile<E> queries, const Factor<E>& keys, const Factor<E>& values, int64_t rows, Tile<S> mixture,
             S* log_sums) {
        score(queries, keys, rows);
        Scores<S, E> s{scores_, {}, rows, keys_, scale_, log_sums, inverse_.data()};
        if constexpr (std::is_same_v<S, E>)
            s.probabilities = scores_;
        else
            s.probabilities = probabilities_;
        kernels_.softmax(s);
        multiply(kernels_, s.probabilities, values, static_cast<const S*>(nullptr), mixture, rows);
        for (int64_t p = 0; p < heads_.panels(); ++p)
            kernels_.rescale(mixture.panel(p), rows, inverse_.data());
    }

  protected:
    void score(Tile<E> queries, const Factor<E>& keys, int64_t rows) {
        for (int64_t p = 0; p < keys.panels(); ++p)
            kernels_.multiply({queries.data, kPanel, 1, queries.stride, keys.panel(p),
                               p + 1 == keys.panels() ? mask_.data() : nullptr, scores_.panel(p), rows,
                               keys.depth(), false});
    }

    const Kernels<T, E>& kernels_;
    const Heads heads_;
    const int64_t keys_;
    const S scale_;
    Lines<S> mask_;
    Buffer<S> inverse_;
    OwnTile<S> scores_;
    OwnTile<E> probabilities_;
};

/// Gradients of queries, keys and values.
template <typename T>
class AttentionBackward : public Attention<T, Computed<T>> {
  public:
    using S = Computed<T>;

    AttentionBackward(const Heads& heads, int64_t keys, int64_t rows, const Kernels<T, S>& kernels)
        : Attention<T, S>(heads, keys, rows, kernels),
          backward_(backward_kernels<T>()),
          d_scores_(rows, keys) {}

    /// One head of a tile. `keys` and `values` are factors [width, keys]; `key_rows` [keys, width] is a tile.
    struct Head {
        Tile<S> queries, grad;
        const Factor<S>&keys, &values;
        Tile<S> key_rows;
        S* log_sums;
        Tile<S> d_queries, d_keys, d_values;  // the last two are added to
    };

    void run_backward(const Head& h, int64_t rows) {
        this->score(h.queries, h.keys, rows);
        multiply(this->kernels_, h.grad, h.values, static_cast<const S*>(nullptr), d_scores_.tile(), rows);
        backward_.softmax(
            {this->scores_, this->scores_, rows, this->keys_, this->scale_, h.log_sums, nullptr}, d_scores_);
        for (int64_t p = 0; p < this->heads_.panels(); ++p) {
            const Tile<S> d = d_scores_;
            this->kernels_.multiply({d.data, kPanel, 1, d.stride, h.key_rows.panel(p), nullptr,
                                     h.d_queries.panel(p), rows, this->keys_, false});
            gather(d_scores_, h.queries.panel(p), h.d_keys.panel(p), rows);
            gather(this->scores_, h.grad.panel(p), h.d_values.panel(p), rows);
        }
    }

  private:
    /// to [keys, 32] += left.T [keys, rows] @ right [rows, 32].
    void gather(Tile<S> left, const S* right, S* to, int64_t rows) {
        for (int64_t first = 0; first < this->keys_; first += kPanel)
            this->kernels_.multiply({left.panel(first / kPanel), 1, kPanel, kPanel * kPanel, right, nullptr,
                                     to + first * kPanel, std::min(kPanel, this->keys_ - first), rows, true});
    }

    const BackwardKernels<T> backward_;
    OwnTile<S> d_scores_;
};

}  // namespace errseg
