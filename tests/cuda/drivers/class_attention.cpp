#include "class_attention/class_attention.cuh"

#include "class_attention/stream.cuh"
#include "driver.h"

namespace op = errseg::class_attention;
static_assert(int64_t(errseg::Number::kBFloat16) == driver::kBFloat16);

#define PROBLEM                                                                                             \
    int64_t type, const int64_t *s, const float *eps, const void *query_text, const void *key_text,         \
        const void *query_weight, const void *key_weight, const void *value_weight, const void *value_bias, \
        const void *out_weight, const void *out_bias, const void *gate_weight, const void *gate_bias,       \
        const void *unit_weight, const void *unit_bias, const void *mlp_out_weight,                         \
        const void *mlp_out_bias, const void *drop_attention, const void *drop_mlp
// Sizes: batch, classes, height and width of the pooled map, channels, heads, hidden, whether there is attention.
#define MADE                          \
    op::Problem{errseg::Number(type), \
                int(s[0]),            \
                int(s[1]),            \
                int(s[2]),            \
                int(s[3]),            \
                int(s[4]),            \
                int(s[5]),            \
                int(s[6]),            \
                *eps,                 \
                query_text,           \
                key_text,             \
                query_weight,         \
                key_weight,           \
                value_weight,         \
                value_bias,           \
                out_weight,           \
                out_bias,             \
                gate_weight,          \
                gate_bias,            \
                unit_weight,          \
                unit_bias,            \
                mlp_out_weight,       \
                mlp_out_bias,         \
                drop_attention,       \
                drop_mlp,             \
                s[7] != 0}

static op::Device device(const int64_t* sizes) {
    return {int(sizes[0]), int(sizes[1])};
}

extern "C" const char* forward(int64_t seed, const int64_t* on, PROBLEM, int64_t in_height, int64_t in_width,
                               const void* x, void* pooled, void* out) {
    return driver::guarded(seed, [&] {
        return op::forward(MADE, {x, int(in_height), int(in_width), pooled, out}, device(on), nullptr);
    });
}

extern "C" const char* backward_mlp(int64_t seed, const int64_t* on, PROBLEM, int64_t first, int64_t count,
                                    const void* grad, const void* source, void* z, void* branch, void* units,
                                    void* units_grad, void* sum_grad) {
    return driver::guarded(seed, [&] {
        return op::backward_mlp(MADE, {grad, source, z, branch, units, units_grad, sum_grad}, int(first),
                                int(count), device(on), nullptr);
    });
}

extern "C" const char* backward_attention(int64_t seed, const int64_t* on, PROBLEM, int64_t first,
                                          int64_t count, const void* sum_grad, const void* pooled,
                                          const void* out_weight_transposed, void* z, void* branch,
                                          void* mixture, void* heads_grad, void* x_grad, int64_t in_height,
                                          int64_t in_width) {
    return driver::guarded(seed, [&] {
        const op::BackwardAttention b{
            sum_grad, pooled,         out_weight_transposed, z, branch, mixture, heads_grad,
            x_grad,   int(in_height), int(in_width)};
        return op::backward_attention(MADE, b, int(first), int(count), device(on), nullptr);
    });
}

// Sizes: pixels, classes, channels, heads.
extern "C" const char* stream(int64_t seed, int64_t type, const int64_t* s, const void* rows, void* mixture,
                              float* log_sums, const void* mixture_grad, void* statistics, void* rows_grad) {
    return driver::guarded(seed, [&] {
        const op::Attention a{errseg::Number(type),
                              int(s[0]),
                              int(s[1]),
                              int(s[2]),
                              int(s[3]),
                              rows,
                              mixture,
                              log_sums,
                              mixture_grad,
                              static_cast<errseg::Statistics*>(statistics),
                              rows_grad};
        return mixture_grad ? op::stream_backward(a, nullptr) : op::stream_forward(a, nullptr);
    });
}

extern "C" const char* most_classes(const int64_t* on, const int64_t* s, int64_t* result) {
    const int64_t type = driver::kBFloat16;
    op::Problem problem{};
    problem.type = errseg::Number(type), problem.channels = int(s[4]), problem.heads = int(s[5]);
    problem.batch = problem.height = problem.width = 1, problem.hidden = int(s[6]);
    return driver::guarded(0, [&] {
        *result = op::most_classes(problem, device(on));
        return cudaSuccess;
    });
}

// Runs body() as one thread of a block.
template <typename Body>
static const char* in_block(int64_t block, const Body& body) {
    return driver::guarded(0, [&] {
        emulator::run(1, 1, 0, [&] {
            emulator::machine().block_index = {unsigned(block), 0, 0};
            body();
        });
        return cudaSuccess;
    });
}

// Where a block of the stream finds queries, their gradient, the mixture's gradient and its statistics.
extern "C" const char* stream_offsets(const int64_t* s, int64_t block, int64_t* result) {
    using T = errseg::half;
    T* const base = reinterpret_cast<T*>(result);
    op::Attention a{errseg::Number::kFloat16, int(s[0]), int(s[1]), int(s[2]), int(s[3])};
    a.rows = a.mixture_grad = a.rows_grad = base;
    return in_block(block, [&] {
        const op::Share<T, 32> share(a);
        result[0] = share.rows(op::kQuery) - base, result[1] = share.rows_grad(op::kQuery) - base;
        result[2] = share.mixture_grad() - base, result[3] = share.of_statistics();
    });
}

// Where the first row of a block of one pixel stands: among rows of channels, in maps before pooling, in guidance.
extern "C" const char* row_offsets(const int64_t* s, int64_t block, int64_t* result) {
    using H = op::How<errseg::half, 8, 32>;
    const auto* base = reinterpret_cast<const H::Number*>(result);
    op::Problem p{};
    p.batch = int(s[0]), p.num_classes = int(s[1]), p.height = int(s[2]), p.width = int(s[3]);
    p.channels = int(s[4]), p.heads = 1, p.key_text = base;
    op::Plan plan{};
    plan.count = p.batch * p.area(), plan.pixels = 1;
    return in_block(block, [&] {
        const op::Rows<H> rows(p, plan);
        result[0] = rows.own_row * p.channels;
        result[1] = rows.corner(rows.own_place, 2 * p.height, 2 * p.width);
        result[2] = rows.added(op::kKey, rows.own_place) - base;
    });
}
