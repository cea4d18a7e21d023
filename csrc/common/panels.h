#pragma once
// Products of small matrices that stay in cache, and what stands between them.
//
// A tile of n columns stands as panels of 32 columns, [n / 32 rounded up, rows, 32], with zeros behind the
// last column; any run of its rows is a tile again. The right factor of a product stands in the same way, its
// depth in the place of the rows. Read with rows and columns exchanged, a tile is a left factor too: so a
// gradient of weights needs no copy. S is what is computed in, E what factors are rounded to.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include "common/halves.h"
#include "common/simd.h"
#include "common/stable.h"

namespace errseg {

constexpr int64_t kPanel = 32;

template <typename T>
using Computed = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline int64_t panels_of(int64_t columns) {
    return divide_up(columns, kPanel);
}
inline int64_t padded(int64_t columns) {
    return panels_of(columns) * kPanel;
}

/// Memory that begins at a cache line and is not written yet.
template <typename E>
class Buffer {
  public:
    Buffer() = default;
    explicit Buffer(int64_t count) {
        const size_t bytes = static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(E);
        memory_.reset(static_cast<E*>(::operator new(bytes, std::align_val_t(64))));
    }
    E* data() const { return memory_.get(); }

  private:
    struct Free {
        void operator()(E* memory) const { ::operator delete(memory, std::align_val_t(64)); }
    };
    std::unique_ptr<E, Free> memory_;
};

/// Panels `stride` numbers apart.
template <typename E>
struct Tile {
    E* data;
    int64_t stride;
    E* panel(int64_t index) const { return data + index * stride; }
    Tile from_row(int64_t row) const { return {data + row * kPanel, stride}; }
    Tile from_panel(int64_t index) const { return {panel(index), stride}; }
};

/// A tile with memory of its own.
template <typename E>
class OwnTile {
  public:
    OwnTile() = default;
    OwnTile(int64_t rows, int64_t columns) : buffer_(rows * padded(columns)), stride_(rows * kPanel) {}
    operator Tile<E>() const { return tile(); }
    Tile<E> tile() const { return {buffer_.data(), stride_}; }
    E* panel(int64_t index) const { return tile().panel(index); }

  private:
    Buffer<E> buffer_;
    int64_t stride_ = 0;
};

// ---- kernels, for one vector width each

/// c [rows, 32] = (initial or c, if any, +) a [rows, depth] @ b [depth, 32].
template <typename S, typename E>
struct Product {
    const E* a;
    int64_t a_row, a_step, a_panel;  // from row to row, from column to column, and to column 32
    const E* b;
    const S* initial;  // [32] or none
    S* c;
    int64_t rows, depth;
    bool add;  // to c
};

template <typename S, int kBytes>
struct Multiply {
    using V = typename Vector<S, kBytes>::Type;
    static constexpr int kLanes = Vector<S, kBytes>::kLanes, kPairs = kPanel / (2 * kLanes);
    static constexpr int kRows = kBytes == 64 ? 8 : 4;

    ERRSEG_INLINE static void run(Product<S, S> p) { rows_from<kRows>(p, 0); }

    template <int kCount>
    ERRSEG_INLINE static void rows_from(const Product<S, S>& p, int64_t row) {
        for (; row + kCount <= p.rows; row += kCount)
            for (int pair = 0; pair < kPairs; ++pair) block<kCount>(p, row, 2 * pair);
        if constexpr (kCount > 1) rows_from<kCount / 2>(p, row);
    }

    template <int kCount>
    ERRSEG_INLINE static void block(const Product<S, S>& p, int64_t row, int64_t first) {
        constexpr int64_t kStep = kPanel / kLanes;
        V left[kCount] = {}, right[kCount] = {};
        const V* b = reinterpret_cast<const V*>(p.b) + first;
        const S* panel = p.a + row * p.a_row;
        for (int64_t start = 0; start < p.depth; start += kPanel, panel += p.a_panel) {
            const S* a = panel;
            const int64_t steps = std::min(kPanel, p.depth - start);
            for (int64_t k = 0; k < steps; ++k, a += p.a_step, b += kStep) {
                const V b0 = b[0], b1 = b[1];
#pragma GCC unroll 8
                for (int i = 0; i < kCount; ++i) {
                    const S value = a[i * p.a_row];
                    left[i] += value * b0;
                    right[i] += value * b1;
                }
            }
        }
        V* c = reinterpret_cast<V*>(p.c + row * kPanel) + first;
        const V* initial = reinterpret_cast<const V*>(p.initial);
#pragma GCC unroll 8
        for (int i = 0; i < kCount; ++i, c += kStep) {
            if (p.initial) left[i] += initial[first], right[i] += initial[first + 1];
            c[0] = p.add ? c[0] + left[i] : left[i];
            c[1] = p.add ? c[1] + right[i] : right[i];
        }
    }
};

#if defined(__x86_64__) && defined(__GNUC__)
#define ERRSEG_PAIRS __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,avx2,fma")))

/// Products of bfloat16 in pairs along the depth, summed up in float32; columns are neighbours in memory.
struct MultiplyPairs {
    ERRSEG_PAIRS static void run(Product<float, BFloat16> p) {
        int64_t row = 0;
        for (; row + 8 <= p.rows; row += 8) block<8>(p, row);
        for (; row + 4 <= p.rows; row += 4) block<4>(p, row);
        for (; row < p.rows; ++row) block<1>(p, row);
    }

    template <int kCount>
    ERRSEG_PAIRS static void block(const Product<float, BFloat16>& p, int64_t row) {
        __m512 left[kCount], right[kCount];
#pragma GCC unroll 8
        for (int i = 0; i < kCount; ++i) left[i] = right[i] = _mm512_setzero_ps();
        const BFloat16 *b = p.b, *panel = p.a + row * p.a_row;
        for (int64_t start = 0; start < p.depth; start += kPanel, panel += p.a_panel) {
            const BFloat16* a = panel;
            const int64_t steps = divide_up(std::min(kPanel, p.depth - start), 2);
            for (int64_t k = 0; k < steps; ++k, a += 2, b += 2 * kPanel) {
                const auto b0 = (__m512bh)_mm512_load_si512(b), b1 = (__m512bh)_mm512_load_si512(b + kPanel);
#pragma GCC unroll 8
                for (int i = 0; i < kCount; ++i) {
                    int pair;
                    std::memcpy(&pair, a + i * p.a_row, 4);
                    const auto values = (__m512bh)_mm512_set1_epi32(pair);
                    left[i] = _mm512_dpbf16_ps(left[i], values, b0);
                    right[i] = _mm512_dpbf16_ps(right[i], values, b1);
                }
            }
        }
        float* c = p.c + row * kPanel;
#pragma GCC unroll 8
        for (int i = 0; i < kCount; ++i, c += kPanel) {
            if (p.initial) {
                left[i] = _mm512_add_ps(left[i], _mm512_load_ps(p.initial));
                right[i] = _mm512_add_ps(right[i], _mm512_load_ps(p.initial + 16));
            }
            if (p.add) {
                left[i] = _mm512_add_ps(left[i], _mm512_load_ps(c));
                right[i] = _mm512_add_ps(right[i], _mm512_load_ps(c + 16));
            }
            _mm512_store_ps(c, left[i]);
            _mm512_store_ps(c + 16, right[i]);
        }
    }
};
#endif

/// exp of vectors up to a little above 0; in float32 to 2 units in the last place, and never below 1e-38.
template <typename S, int kBytes>
struct Exp {
    using V = typename Vector<S, kBytes>::Type;
    ERRSEG_INLINE static V run(V x) {
        for (int l = 0; l < Vector<S, kBytes>::kLanes; ++l) x[l] = std::exp(x[l]);
        return x;
    }
};

template <int kBytes>
struct Exp<float, kBytes> {
    using V = typename Vector<float, kBytes>::Type;
    typedef int32_t I __attribute__((vector_size(kBytes), may_alias));

    ERRSEG_INLINE static V run(V x) {
        const V lowest = V{} - 87.f;
        x = x < lowest ? lowest : x;
        const V shifted = x * 1.442695041f + 12582912.f;  // the nearest integer in the low bits
        return exp_remainder(x, shifted - 12582912.f) * (V)(((I)shifted << 23) + 0x3F800000);
    }
};

typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32), may_alias));

/// Scores of `rows` queries with `keys` keys.
template <typename S, typename E>
struct Scores {
    Tile<S> scores;  // [rows, keys], the columns behind the last key at minus infinity
    Tile<E> probabilities;
    int64_t rows, keys;
    S scale;
    S *log_sums, *inverse_sums;  // [rows]
};

/// Probabilities times the sum of their row, at most 1 each.
template <typename S, typename E, int kBytes>
struct Softmax {
    using V = typename Vector<S, kBytes>::Type;
    static constexpr int kLanes = Vector<S, kBytes>::kLanes, kVectors = kPanel / kLanes;

    ERRSEG_INLINE static void run(Scores<S, E> s) {
        const int64_t panels = panels_of(s.keys);
        for (int64_t row = 0; row < s.rows; ++row) {
            const Tile<S> scores = s.scores.from_row(row);
            V most = V{} - std::numeric_limits<S>::infinity();
            for (int64_t p = 0; p < panels; ++p)
#pragma GCC unroll 8
                for (int i = 0; i < kVectors; ++i) {
                    const V value = reinterpret_cast<const V*>(scores.panel(p))[i];
                    most = value > most ? value : most;
                }
            S largest = most[0];
            for (int l = 1; l < kLanes; ++l) largest = most[l] > largest ? most[l] : largest;
            const S shift = largest * s.scale;
            V sums = {};
            for (int64_t p = 0; p < panels; ++p)
#pragma GCC unroll 8
                for (int i = 0; i < kVectors; ++i) {
                    const V value = reinterpret_cast<const V*>(scores.panel(p))[i];
                    const V e = Exp<S, kBytes>::run(value * s.scale - shift);
                    sums += e;
                    put(e, s.probabilities.from_row(row).panel(p) + i * kLanes);
                }
            S sum = 0;
            for (int l = 0; l < kLanes; ++l) sum += sums[l];
            s.log_sums[row] = shift + std::log(sum);
            s.inverse_sums[row] = 1 / sum;
        }
    }

    /// E is S, or bfloat16 in vectors of 64 bytes.
    ERRSEG_INLINE static void put(V values, E* to) {
        if constexpr (std::is_same_v<S, E>) {
            *reinterpret_cast<V*>(to) = values;
        } else {
            Bits bits;
            std::memcpy(&bits, &values, sizeof bits);
            bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
            *reinterpret_cast<Halves*>(to) = __builtin_convertvector(bits, Halves);
        }
    }
};

#if defined(__x86_64__) && defined(__GNUC__)
/// The same where the processor rounds to bfloat16 itself: exponentials to 18 bits, 8 of which are kept.
struct SoftmaxPairs {
    ERRSEG_PAIRS static void run(Scores<float, BFloat16> s) {
        const int64_t panels = panels_of(s.keys);
        const float factor = s.scale * 1.442695041f;
        for (int64_t row = 0; row < s.rows; ++row) {
            const Tile<float> scores = s.scores.from_row(row);
            const Tile<BFloat16> to = s.probabilities.from_row(row);
            __m512 most = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
            for (int64_t p = 0; p < panels; ++p)
                most = _mm512_max_ps(most, _mm512_max_ps(_mm512_load_ps(scores.panel(p)),
                                                         _mm512_load_ps(scores.panel(p) + 16)));
            const float largest = _mm512_reduce_max_ps(most);
            const __m512 factors = _mm512_set1_ps(factor), shifts = _mm512_set1_ps(largest * factor);
            __m512 left = _mm512_setzero_ps(), right = left;
            for (int64_t p = 0; p < panels; ++p) {
                const __m512 low = exp2(_mm512_fmsub_ps(_mm512_load_ps(scores.panel(p)), factors, shifts));
                const __m512 high =
                    exp2(_mm512_fmsub_ps(_mm512_load_ps(scores.panel(p) + 16), factors, shifts));
                left = _mm512_add_ps(left, low);
                right = _mm512_add_ps(right, high);
                _mm512_store_si512(to.panel(p), (__m512i)_mm512_cvtne2ps_pbh(high, low));
            }
            const float sum = _mm512_reduce_add_ps(_mm512_add_ps(left, right));
            s.log_sums[row] = largest * s.scale + std::log(sum);
            s.inverse_sums[row] = 1 / sum;
        }
    }

    /// 2 to the power of numbers up to a little above 0; NaN stays NaN.
    ERRSEG_PAIRS static __m512 exp2(__m512 x) {
        x = _mm512_max_ps(_mm512_set1_ps(-150.f), x);
        const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const __m512 r = _mm512_sub_ps(x, n);  // in [-1/2, 1/2]
        __m512 p = _mm512_set1_ps(9.570101434e-03f);
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.591786028e-02f));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.402474484e-01f));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.931218147e-01f));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.999992614e-01f));
        return _mm512_scalef_ps(p, n);
    }
};
#endif

/// From scores and log sums to probabilities; from gradients of the probabilities to those of the scores.
template <typename S, int kBytes>
struct SoftmaxBackward {
    using V = typename Vector<S, kBytes>::Type;
    static constexpr int kLanes = Vector<S, kBytes>::kLanes, kVectors = kPanel / kLanes;

    ERRSEG_INLINE static void run(Scores<S, S> s, Tile<S> gradients) {
        const int64_t panels = panels_of(s.keys);
        for (int64_t row = 0; row < s.rows; ++row) {
            const Tile<S> p = s.scores.from_row(row), d = gradients.from_row(row);
            V sums = {}, products = {};
            for (int64_t at = 0; at < panels; ++at)
#pragma GCC unroll 8
                for (int i = 0; i < kVectors; ++i) {
                    V& value = reinterpret_cast<V*>(p.panel(at))[i];
                    value = Exp<S, kBytes>::run(value * s.scale - s.log_sums[row]);
                    sums += value;
                    products += value * reinterpret_cast<const V*>(d.panel(at))[i];
                }
            S sum = 0, product = 0;
            for (int l = 0; l < kLanes; ++l) sum += sums[l], product += products[l];
            // Rounded probabilities do not add up to 1, but the gradients of the scores must add up to 0.
            const S mean = product / sum;
            for (int64_t at = 0; at < panels; ++at)
#pragma GCC unroll 8
                for (int i = 0; i < kVectors; ++i) {
                    V& gradient = reinterpret_cast<V*>(d.panel(at))[i];
                    gradient = s.scale * reinterpret_cast<const V*>(p.panel(at))[i] * (gradient - mean);
                }
        }
    }
};

/// `count` columns from `from` on as a panel's row of S, zeros behind them.
template <typename S, typename T>
ERRSEG_INLINE void read_row(const T* __restrict from, int64_t count, S* __restrict to) {
    if (count >= kPanel) {
#pragma omp simd
        for (int l = 0; l < kPanel; ++l) to[l] = widen(from[l]);
    } else {
        for (int64_t l = 0; l < kPanel; ++l) to[l] = l < count ? widen(from[l]) : S(0);
    }
}

template <typename S, typename T>
ERRSEG_INLINE void write_row(const S* __restrict from, int64_t count, T* __restrict to) {
    if (count >= kPanel) {
#pragma omp simd
        for (int l = 0; l < kPanel; ++l) to[l] = narrow<T>(from[l]);
    } else {
        for (int64_t l = 0; l < count; ++l) to[l] = narrow<T>(from[l]);
    }
}

template <typename S>
ERRSEG_INLINE S total(const S* values) {
    S sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int l = 0; l < kPanel; ++l) sum += values[l];
    return sum;
}

/// to = scale * a row of numbers.
template <typename T, typename S>
struct Load {
    ERRSEG_INLINE static void run(const T* row, int64_t columns, S scale, Tile<S> to) {
        for (int64_t start = 0; start < columns; start += kPanel, to.data += to.stride) {
            read_row(row + start, columns - start, to.data);
#pragma omp simd
            for (int l = 0; l < kPanel; ++l) to.data[l] *= scale;
        }
    }
};

/// A row of numbers = added, if any, + scale * from.
template <typename T, typename S>
struct Store {
    ERRSEG_INLINE static void run(Tile<S> from, int64_t columns, S scale, const T* added, T* row) {
        for (int64_t start = 0; start < columns; start += kPanel, from.data += from.stride) {
            S sums[kPanel] = {};
            if (added) read_row(added + start, columns - start, sums);
#pragma omp simd
            for (int l = 0; l < kPanel; ++l) sums[l] += scale * from.data[l];
            write_row(sums, columns - start, row + start);
        }
    }
};

/// LayerNorm of a row; its inverse deviation is kept where it is wanted.
template <typename T, typename S, typename E>
struct Normalize {
    ERRSEG_INLINE static void run(const T* row, int64_t columns, S eps, Tile<E> to, S* kept) {
        S sums[kPanel] = {}, squares[kPanel] = {}, values[kPanel];
        for (int64_t start = 0; start < columns; start += kPanel) {
            read_row(row + start, columns - start, values);
#pragma omp simd
            for (int l = 0; l < kPanel; ++l) sums[l] += values[l];
        }
        const S mean = total(sums) / static_cast<S>(columns);
        for (int64_t start = 0; start < columns; start += kPanel) {
            centre(row, columns, start, mean, values);
#pragma omp simd
            for (int l = 0; l < kPanel; ++l) squares[l] += values[l] * values[l];
        }
        const S scale = 1 / std::sqrt(total(squares) / static_cast<S>(columns) + eps);
        for (int64_t start = 0; start < columns; start += kPanel, to.data += to.stride) {
            centre(row, columns, start, mean, values);
#pragma omp simd
            for (int l = 0; l < kPanel; ++l) to.data[l] = narrow<E>(values[l] * scale);
        }
        if (kept) *kept = scale;
    }

    ERRSEG_INLINE static void centre(const T* row, int64_t columns, int64_t start, S mean, S* values) {
        read_row(row + start, columns - start, values);
        if (columns - start >= kPanel) {
#pragma omp simd
            for (int l = 0; l < kPanel; ++l) values[l] -= mean;
        } else {
            for (int64_t l = 0; l < columns - start; ++l) values[l] -= mean;
        }
    }
};

/// A row's gradient from that of its LayerNorm `z`: scale * (dz - mean(dz) - z * mean(dz * z)), plus `added`.
template <typename T, typename S>
struct NormalizeBackward {
    ERRSEG_INLINE static void run(Tile<S> dz, Tile<S> z, int64_t columns, S scale, const T* added, T* row) {
        S sums[kPanel] = {}, products[kPanel] = {};
        for (int64_t p = 0; p < panels_of(columns); ++p) {
            const S *d = dz.panel(p), *n = z.panel(p);
#pragma omp simd
            for (int l = 0; l < kPanel; ++l) sums[l] += d[l], products[l] += d[l] * n[l];
        }
        const S mean = total(sums) / static_cast<S>(columns),
                slope = total(products) / static_cast<S>(columns);
        for (int64_t start = 0; start < columns; start += kPanel) {
            const S *d = dz.panel(start / kPanel), *n = z.panel(start / kPanel);
            S values[kPanel] = {};
            if (added) read_row(added + start, columns - start, values);
#pragma omp simd
            for (int l = 0; l < kPanel; ++l) values[l] += scale * (d[l] - mean - n[l] * slope);
            write_row(values, columns - start, row + start);
        }
    }
};

/// A panel rounded to factors.
template <typename S, typename E>
struct Round {
    ERRSEG_INLINE static void run(const S* __restrict from, int64_t rows, E* __restrict to) {
#pragma omp simd
        for (int64_t i = 0; i < rows * kPanel; ++i) to[i] = narrow<E>(from[i]);
    }
};

/// Rows of a panel, each times its scale, in place.
template <typename S>
struct Rescale {
    ERRSEG_INLINE static void run(S* panel, int64_t rows, const S* scales) {
        for (int64_t row = 0; row < rows; ++row, panel += kPanel)
#pragma omp simd
            for (int l = 0; l < kPanel; ++l) panel[l] *= scales[row];
    }
};

/// One number per row: the sum of products of two tiles.
template <typename S>
struct DotRows {
    ERRSEG_INLINE static void run(Tile<S> a, Tile<S> b, int64_t rows, int64_t panels, S* dots) {
        for (int64_t row = 0; row < rows; ++row) {
            S sums[kPanel] = {};
            for (int64_t p = 0; p < panels; ++p) {
                const S *x = a.panel(p) + row * kPanel, *y = b.panel(p) + row * kPanel;
#pragma omp simd
                for (int l = 0; l < kPanel; ++l) sums[l] += x[l] * y[l];
            }
            dots[row] = total(sums);
        }
    }
};

/// to [rows, 32] += from [rows, 32] times a scale per row, or [1, 32] for all rows where from_row is 0.
template <typename S>
struct AddRows {
    ERRSEG_INLINE static void run(const S* from, int64_t from_row, int64_t rows, const S* scales, S* to) {
        for (int64_t row = 0; row < rows; ++row, from += from_row, to += kPanel) {
            const S scale = scales ? scales[row] : S(1);
#pragma omp simd
            for (int l = 0; l < kPanel; ++l) to[l] += scale * from[l];
        }
    }
};

/// sums [32] += the sum over the rows of a panel, in several parts: a long sum loses digits.
template <typename S>
struct SumRows {
    static constexpr int64_t kParts = 8;
    ERRSEG_INLINE static void run(const S* from, int64_t rows, S* sums) {
        S parts[kParts][kPanel] = {};
        for (int64_t row = 0; row < rows; ++row, from += kPanel)
#pragma omp simd
            for (int l = 0; l < kPanel; ++l) parts[row % kParts][l] += from[l];
        for (int64_t half = kParts / 2; half > 0; half /= 2)
            for (int64_t i = 0; i < half; ++i)
#pragma omp simd
                for (int l = 0; l < kPanel; ++l) parts[i][l] += parts[i + half][l];
#pragma omp simd
        for (int l = 0; l < kPanel; ++l) sums[l] += parts[0][l];
    }
};

/// NaN stays NaN, and lets gradients through.
template <typename S>
ERRSEG_INLINE S relu6(S x) {
    x = x < 0 ? S(0) : x;
    return x > 6 ? S(6) : x;
}

/// hidden = ReLU6(gate) * value.
template <typename S, typename E>
struct Gate {
    ERRSEG_INLINE static void run(const S* gate, const S* value, int64_t count, E* hidden) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) hidden[i] = narrow<E>(relu6(gate[i]) * value[i]);
    }
};

/// In place.
template <typename S>
struct Relu6 {
    ERRSEG_INLINE static void run(S* values, int64_t count) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) values[i] = relu6(values[i]);
    }
};

/// Gradients in place, of what went in.
template <typename S>
struct Relu6Backward {
    ERRSEG_INLINE static void run(const S* __restrict values, S* __restrict gradients, int64_t count) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i)
            gradients[i] = values[i] <= 0 || values[i] >= 6 ? S(0) : gradients[i];
    }
};

/// The mean of two neighbours and the two `down` numbers behind them.
template <typename T, typename S>
struct Pool {
    ERRSEG_INLINE static void run(const T* __restrict corner, int64_t down, int64_t columns,
                                  T* __restrict to) {
#pragma omp simd
        for (int64_t c = 0; c < columns; ++c) {
            const S upper = widen(corner[c]) + widen(corner[c + columns]);
            const S lower = widen(corner[down + c]) + widen(corner[down + c + columns]);
            to[c] = narrow<T>((upper + lower) * S(0.25));
        }
    }
};

/// In place: gate and value to their gradients, the gradient of the hidden units to the hidden units.
template <typename S>
struct GateBackward {
    ERRSEG_INLINE static void run(S* __restrict gate, S* __restrict value, S* __restrict hidden,
                                  int64_t count) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) {
            const S g = gate[i], v = value[i], d = hidden[i], opened = relu6(g);
            gate[i] = g <= 0 || g >= 6 ? S(0) : d * v;
            value[i] = d * opened;
            hidden[i] = opened * v;
        }
    }
};

// ---- one table of them per processor

/// Kernels on rows of T, products in S of factors rounded to E.
template <typename T, typename E>
struct Kernels {
    using S = Computed<T>;
    void (*multiply)(Product<S, E>);
    void (*softmax)(Scores<S, E>);
    void (*normalize)(const T*, int64_t, S, Tile<E>, S*);
    void (*load)(const T*, int64_t, S, Tile<S>);
    void (*store)(Tile<S>, int64_t, S, const T*, T*);
    void (*round)(const S*, int64_t, E*);
    void (*rescale)(S*, int64_t, const S*);
    void (*dot_rows)(Tile<S>, Tile<S>, int64_t, int64_t, S*);
    void (*add_rows)(const S*, int64_t, int64_t, const S*, S*);
    void (*gate)(const S*, const S*, int64_t, E*);
    void (*relu6)(S*, int64_t);
    void (*pool)(const T*, int64_t, int64_t, T*);
};

/// What backward passes need besides.
template <typename T>
struct BackwardKernels {
    using S = Computed<T>;
    void (*softmax)(Scores<S, S>, Tile<S>);
    void (*normalize)(Tile<S>, Tile<S>, int64_t, S, const T*, T*);
    void (*sum_rows)(const S*, int64_t, S*);
    void (*gate)(S*, S*, S*, int64_t);
    void (*relu6)(const S*, S*, int64_t);
};

#define ERRSEG_KERNELS(isa, bytes)                                                                 \
    {isa<Multiply<S, bytes>>, isa<Softmax<S, S, bytes>>, isa<Normalize<T, S, S>>, isa<Load<T, S>>, \
     isa<Store<T, S>>,        isa<Round<S, S>>,          isa<Rescale<S>>,         isa<DotRows<S>>, \
     isa<AddRows<S>>,         isa<Gate<S, S>>,           isa<Relu6<S>>,           isa<Pool<T, S>>}
#define ERRSEG_BACKWARD_KERNELS(isa, bytes)                                                               \
    {isa<SoftmaxBackward<S, bytes>>, isa<NormalizeBackward<T, S>>, isa<SumRows<S>>, isa<GateBackward<S>>, \
     isa<Relu6Backward<S>>}

template <typename T>
Kernels<T, Computed<T>> kernels() {
    using S = Computed<T>;
#if defined(__x86_64__) && defined(__GNUC__)
    if (vector_bytes() == 64) return ERRSEG_KERNELS(avx512, 64);
    if (vector_bytes() == 32) return ERRSEG_KERNELS(avx2, 32);
#endif
    return ERRSEG_KERNELS(baseline, 16);
}

template <typename T>
BackwardKernels<T> backward_kernels() {
    using S = Computed<T>;
#if defined(__x86_64__) && defined(__GNUC__)
    if (vector_bytes() == 64) return ERRSEG_BACKWARD_KERNELS(avx512, 64);
    if (vector_bytes() == 32) return ERRSEG_BACKWARD_KERNELS(avx2, 32);
#endif
    return ERRSEG_BACKWARD_KERNELS(baseline, 16);
}

/// Calls `body` with the kernels that a forward pass on rows of T takes here.
template <typename T, typename Body>
void with_kernels(const Body& body) {
#if defined(__x86_64__) && defined(__GNUC__)
    if constexpr (std::is_same_v<T, BFloat16>)
        if (vector_bytes() == 64 && __builtin_cpu_supports("avx512bf16"))
            return body(Kernels<T, T>{MultiplyPairs::run, SoftmaxPairs::run, avx512<Normalize<T, float, T>>,
                                      avx512<Load<T, float>>, avx512<Store<T, float>>,
                                      avx512<Round<float, T>>, avx512<Rescale<float>>, avx512<DotRows<float>>,
                                      avx512<AddRows<float>>, avx512<Gate<float, T>>, avx512<Relu6<float>>,
                                      avx512<Pool<T, float>>});
#endif
    body(kernels<T>());
}

// ---- weights

/// Where channels stand when every head begins a panel of its own; one head for channels without heads.
struct Heads {
    int64_t count, width;
    static Heads none(int64_t channels) { return {1, channels}; }
    int64_t channels() const { return count * width; }
    int64_t panels() const { return panels_of(width); }  // of a head
    int64_t columns() const { return count * padded(width); }
    int64_t place(int64_t channel) const { return channel / width * padded(width) + channel % width; }
};

/// A right factor [depth, columns], in panels [depth, 32]; of bfloat16 [depth / 2 rounded up, 32, 2].
template <typename E>
class Factor {
  public:
    static constexpr int64_t kPair = std::is_same_v<E, BFloat16> ? 2 : 1;

    /// Not written yet, but for what fills up the last pair.
    Factor(int64_t depth, int64_t columns)
        : depth_(depth),
          stride_(divide_up(depth, kPair) * kPair * kPanel),
          panels_(panels_of(columns)),
          buffer_(panels_ * stride_) {
        if (depth % kPair)
            for (int64_t n = 0; n < panels_ * kPanel; ++n) at(depth, n) = E(0);
    }
    Factor&& zeros() && {
        std::fill(buffer_.data(), buffer_.data() + panels_ * stride_, E(0));
        return std::move(*this);
    }
    E& at(int64_t k, int64_t n) {
        return buffer_.data()[n / kPanel * stride_ + (k / kPair * kPanel + n % kPanel) * kPair + k % kPair];
    }
    const E* panel(int64_t index) const { return buffer_.data() + index * stride_; }
    int64_t depth() const { return depth_; }
    int64_t panels() const { return panels_; }

  private:
    int64_t depth_, stride_, panels_;
    Buffer<E> buffer_;
};

/// A weight [outputs, inputs], some columns of it: `x @ weight.T`, or `x @ weight` for its gradient.
struct Weight {
    const Tensor& tensor;
    Heads outputs, inputs;
    int64_t first = 0;  // of its columns

    template <typename E>
    Factor<E> forward() const {
        Factor<E> factor = Factor<E>(inputs.columns(), outputs.columns()).zeros();
        each<E>([&](int64_t i, int64_t j, E value) { factor.at(inputs.place(j), outputs.place(i)) = value; });
        return factor;
    }
    template <typename E>
    Factor<E> backward() const {
        Factor<E> factor = Factor<E>(outputs.columns(), inputs.columns()).zeros();
        each<E>([&](int64_t i, int64_t j, E value) { factor.at(outputs.place(i), inputs.place(j)) = value; });
        return factor;
    }

  private:
    template <typename E, typename Put>
    void each(const Put& put) const {
        using S = Computed<E>;
        const Reader<S> read = reader<S>(tensor, "weight");
        std::vector<S> row(inputs.channels());
        for (int64_t i = 0; i < outputs.channels(); ++i) {
            read(tensor, i * tensor.size(1) + first, inputs.channels(), row.data());
            for (int64_t j = 0; j < inputs.channels(); ++j) put(i, j, narrow<E>(row[j]));
        }
    }
};

/// A bias in panels.
template <typename S>
Lines<S> read_bias(const Tensor& bias, const Heads& heads) {
    Lines<S> placed(heads.columns());
    std::vector<S> values(heads.channels());
    reader<S>(bias, "bias")(bias, 0, heads.channels(), values.data());
    for (int64_t i = 0; i < heads.channels(); ++i) placed.data()[heads.place(i)] = values[i];
    return placed;
}

/// `count` factors of drop path, ones where there are none.
template <typename S>
std::vector<S> read_scales(const std::optional<Tensor>& scales, int64_t count) {
    std::vector<S> read(count, S(1));
    if (scales) reader<S>(*scales, "drop_path")(*scales, 0, count, read.data());
    return read;
}

/// c = (bias +) a @ factor for `rows` rows, or c += a @ factor.
template <typename K, typename E, typename S>
void multiply(const K& kernels, Tile<E> a, const Factor<E>& factor, const S* bias, Tile<S> c, int64_t rows,
              bool add = false) {
    for (int64_t p = 0; p < factor.panels(); ++p)
        kernels.multiply({a.data, kPanel, 1, a.stride, factor.panel(p), bias ? bias + p * kPanel : nullptr,
                          c.panel(p), rows, factor.depth(), add});
}

// ---- gradients of weights

/// The tile itself where nothing is rounded, else a rounded copy.
template <typename K, typename S, typename E>
Tile<E> rounded(const K& kernels, Tile<S> from, int64_t columns, int64_t rows, OwnTile<E>& copy) {
    if constexpr (std::is_same_v<S, E>) {
        return from;
    } else {
        for (int64_t p = 0; p < panels_of(columns); ++p) kernels.round(from.panel(p), rows, copy.panel(p));
        return copy;
    }
}

/// A gradient [outputs, inputs], in panels of inputs, somewhere among the sums of a group.
struct Gradient {
    Heads outputs, inputs;
    int64_t rows, start;

    int64_t size() const { return rows * inputs.columns(); }
    int64_t index(int64_t output, int64_t input) const {
        const int64_t row = outputs.place(output), column = inputs.place(input);
        return start + (column / kPanel * rows + row) * kPanel + column % kPanel;
    }

    /// += left.T @ right, both with `count` rows.
    template <typename K, typename S>
    void add(const K& kernels, Tile<S> left, Tile<S> right, int64_t count, S* sums) const {
        for (int64_t n = 0; n < panels_of(inputs.columns()); ++n)
            for (int64_t m = 0; m < rows / kPanel; ++m)
                kernels.multiply({left.panel(m), 1, kPanel, kPanel * kPanel, right.panel(n), nullptr,
                                  sums + start + (n * rows + m * kPanel) * kPanel, kPanel, count, true});
    }

    /// Of a bias: += the sum over `count` rows.
    template <typename K, typename S>
    void sum_rows(const K& kernels, Tile<S> tile, int64_t count, S* sums) const {
        for (int64_t n = 0; n < panels_of(inputs.columns()); ++n)
            kernels.sum_rows(tile.panel(n), count, sums + start + n * kPanel);
    }

    /// Rows from `first` on += `count` rows.
    template <typename K, typename S>
    void add_rows(const K& kernels, Tile<S> tile, int64_t first, int64_t count, S* sums) const {
        for (int64_t n = 0; n < panels_of(inputs.columns()); ++n)
            kernels.add_rows(tile.panel(n), kPanel, count, nullptr,
                             sums + start + (n * rows + first) * kPanel);
    }
};

/// Takes places for gradients one after the other.
class Places {
  public:
    Gradient take(const Heads& outputs, const Heads& inputs) {
        return take(outputs, inputs, outputs.columns());
    }
    /// Of a bias: one row.
    Gradient take(const Heads& outputs) { return take({1, 1}, outputs, 1); }
    int64_t size() const { return size_; }

  private:
    Gradient take(const Heads& outputs, const Heads& inputs, int64_t rows) {
        const Gradient taken{outputs, inputs, rows, size_};
        size_ += taken.size();
        return taken;
    }
    int64_t size_ = 0;
};

constexpr int64_t kGroups = 16;  // of tasks, which add up gradients of weights one after the other

/// Sums of every group, added up in their order.
template <typename S>
class Totals {
  public:
    Totals(int64_t groups, int64_t size) : groups_(groups), size_(padded(size)), sums_(groups * size_) {}

    /// Zeros.
    S* start(int64_t group) {
        std::fill(sums_.data() + group * size_, sums_.data() + (group + 1) * size_, S(0));
        return sums_.data() + group * size_;
    }
    S* group(int64_t group) { return sums_.data() + group * size_; }
    /// After add_up().
    S at(int64_t index) const { return sums_.data()[index]; }

    /// All groups into the first.
    void add_up() {
        torch::stable::parallel_for(0, size_ / kPanel, 1024, [&](int64_t begin, int64_t end) {
            for (int64_t at = begin * kPanel; at < end * kPanel; at += kPanel)
                for (int64_t group = 1; group < groups_; ++group)
                    for (int64_t l = at; l < at + kPanel; ++l)
                        sums_.data()[l] += sums_.data()[group * size_ + l];
        });
    }

    /// The tensor [outputs, all inputs] of a gradient, or some columns of it.
    void write(const Gradient& gradient, const Tensor& tensor, int64_t first = 0) const {
        const int64_t columns = tensor.dim() == 2 ? tensor.size(1) : tensor.size(0);
        visit_floating(tensor, "gradient", [&](auto tag) {
            using G = typename decltype(tag)::type;
            for (int64_t i = 0; i < gradient.outputs.channels(); ++i)
                for (int64_t j = 0; j < gradient.inputs.channels(); ++j)
                    mutable_data<G>(tensor)[i * columns + first + j] =
                        narrow<G>(static_cast<Computed<G>>(at(gradient.index(i, j))));
        });
    }

  private:
    int64_t groups_, size_;
    Buffer<S> sums_;
};

/// The part of `count` that a group takes.
inline std::pair<int64_t, int64_t> part(int64_t count, int64_t group, int64_t groups) {
    return {count * group / groups, count * (group + 1) / groups};
}

}  // namespace errseg
