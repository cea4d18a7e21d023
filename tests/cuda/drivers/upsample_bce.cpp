#include "upsample_bce/upsample_bce.cuh"

#include "driver.h"

extern "C" const char* upsample_bce(int64_t seed, int64_t type, const void* logits, const int64_t* class_ids,
                                    const void* target, int64_t target_bytes, int64_t target_signed,
                                    void* loss, void* gradient, int64_t batch, int64_t classes, int64_t in_y,
                                    int64_t in_x, int64_t out_y, int64_t out_x, int64_t vocabulary_size,
                                    int64_t ignore_index, int64_t exclude_ignored) {
    namespace op = errseg::upsample_bce;
    return driver::guarded(seed, [&] {
        return driver::visit(type, [&](auto number) {
            using T = decltype(number);
            using S = errseg::accumulator_t<T>;
            op::Problem<T> problem({int(in_y), int(out_y)}, {int(in_x), int(out_x)});
            problem.logits = static_cast<const T*>(logits);
            problem.class_ids = class_ids;
            problem.target = {target, int(target_bytes), target_signed != 0};
            problem.loss = static_cast<S*>(loss);
            problem.gradient = static_cast<S*>(gradient);
            problem.batch = int(batch), problem.classes = int(classes);
            problem.vocabulary_size = vocabulary_size, problem.ignore_index = ignore_index;
            problem.exclude_ignored = exclude_ignored != 0;
            const std::unique_ptr<op::Share[]> shares(new op::Share[problem.num_blocks()]);
            std::memset(static_cast<void*>(shares.get()), 0xFF, problem.num_blocks() * sizeof(op::Share));
            unsigned long long num_valid = 0;
            problem.shares = shares.get(), problem.num_valid = &num_valid;
            return op::run(problem, nullptr);
        });
    });
}
