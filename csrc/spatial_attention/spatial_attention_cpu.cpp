// Attention among the pixels of a class, with keys and values from windows of pixels.
//
// Pixels stand window by window: first the first pixel of every window, then the second, ..., at the end those
// outside of all windows. So the windows [N_kv, r r C] are r r runs of rows of the pixels, and nothing is
// cut out. The forward pass makes the keys and values of all classes, then takes tiles of pixels; the backward
// pass takes a class at a time, whose tensors all fit the third cache.
#include <optional>
#include <tuple>

#include "common/attend.h"

namespace errseg {
namespace {

constexpr int64_t kWindows = 64;  // of a task that makes keys and values

struct Tensors {
    Tensor x, query_map, key_map, query, key_reduce, key, value_reduce, value_reduce_bias, value, value_bias,
        out, out_bias;
    std::optional<Tensor> drop_path;

    int64_t batch, classes, height, width, channels, pixels, stride, windows;
    Heads heads;

    void check(int64_t num_heads) {
        expect(x.dim() == 5, "x [B, K, H, W, C]", x);
        batch = x.size(0), classes = x.size(1), height = x.size(2), width = x.size(3), channels = x.size(4);
        pixels = height * width;
        STD_TORCH_CHECK(num_heads > 0 && channels % num_heads == 0, "expected num_heads that divides ",
                        channels, ", got ", num_heads);
        heads = {num_heads, channels / num_heads};
        const int64_t per_window = value_reduce.size(1) / channels;
        stride = static_cast<int64_t>(std::lround(std::sqrt(static_cast<double>(per_window))));
        windows = (height / stride) * (width / stride);
        const int64_t c = channels;
        expect(query_map.numel() == batch * pixels * c, "query_map [B, H, W, C]", query_map);
        expect(key_map.numel() == batch * windows * 2 * c, "key_map [B, N_kv, 2C]", key_map);
        expect(query.numel() == c * c, "query_weight [C, C]", query);
        expect(key_reduce.numel() == 2 * c * per_window * c, "key_reduce_weight [2C, r r C]", key_reduce);
        expect(key.numel() == 2 * c * c, "key_weight [C, 2C]", key);
        expect(value_reduce.numel() == c * per_window * c, "value_reduce_weight [C, r r C]", value_reduce);
        expect(value_reduce_bias.numel() == c, "value_reduce_bias [C]", value_reduce_bias);
        expect(value.numel() == c * c, "value_weight [C, C]", value);
        expect(value_bias.numel() == c, "value_bias [C]", value_bias);
        expect(out.numel() == c * c, "out_weight [C, C]", out);
        expect(out_bias.numel() == c, "out_bias [C]", out_bias);
        if (drop_path) expect(drop_path->numel() == batch * classes, "drop_path [B, K]", *drop_path);
    }

    int64_t parts() const { return stride * stride; }
    Heads one() const { return Heads::none(channels); }
    Heads two() const { return Heads::none(2 * channels); }
    Weight query_weight() const { return {query, heads, one()}; }
    Weight key_weight() const { return {key, heads, two()}; }
    Weight value_weight() const { return {value, heads, one()}; }
    Weight out_weight() const { return {out, one(), heads}; }
    /// The share of one pixel of the windows.
    Weight key_part(int64_t i) const { return {key_reduce, two(), one(), i * channels}; }
    Weight value_part(int64_t i) const { return {value_reduce, one(), one(), i * channels}; }

    /// Pixels in the order that the file's head tells.
    std::vector<int64_t> order() const {
        std::vector<int64_t> found;
        const int64_t rows = height / stride, columns = width / stride;
        for (int64_t i = 0; i < parts(); ++i)
            for (int64_t y = 0; y < rows; ++y)
                for (int64_t x = 0; x < columns; ++x)
                    found.push_back((y * stride + i / stride) * width + x * stride + i % stride);
        for (int64_t y = 0; y < height; ++y)
            for (int64_t x = 0; x < width; ++x)
                if (y >= rows * stride || x >= columns * stride) found.push_back(y * width + x);
        return found;
    }
};

/// Keys and values out of windows.
template <typename T, typename E>
class Reduction {
  public:
    using S = Computed<T>;

    Reduction(const Tensors& t, double eps, const Kernels<T, E>& kernels)
        : t_(t),
          eps_(static_cast<S>(eps)),
          kernels_(kernels),
          key_(t.key_weight().template forward<E>()),
          value_(t.value_weight().template forward<E>()),
          value_bias_(read_bias<S>(t.value_bias, t.heads)),
          value_reduce_bias_(read_bias<S>(t.value_reduce_bias, t.one())) {
        for (int64_t i = 0; i < t.parts(); ++i) {
            key_parts_.push_back(t.key_part(i).template forward<E>());
            value_parts_.push_back(t.value_part(i).template forward<E>());
        }
    }

    struct Reduced {
        Reduced(const Tensors& t, int64_t rows)
            : reduced_key(rows, 2 * t.channels),
              reduced_value(rows, t.channels),
              key(rows, t.heads.columns()),
              value(rows, t.heads.columns()),
              key_scales(rows),
              value_scales(rows) {
            if constexpr (!std::is_same_v<S, E>) copy = OwnTile<E>(rows, 2 * t.channels);
        }
        OwnTile<S> reduced_key, reduced_value, key, value;
        Buffer<S> key_scales, value_scales;
        OwnTile<E> copy;
    };

    /// `z` holds the r r pixels of each of `rows` windows, `part` rows apart; key_map [rows, 2C]. The value's
    /// bias is left out.
    void run(Tile<E> z, int64_t part, const T* key_map, int64_t rows, Reduced& r) const {
        for (int64_t row = 0; row < rows; ++row)
            kernels_.load(key_map + row * 2 * t_.channels, 2 * t_.channels, S(1),
                          r.reduced_key.tile().from_row(row));
        for (int64_t i = 0; i < t_.parts(); ++i) {
            const Tile<E> pixels = z.from_row(i * part);
            multiply<Kernels<T, E>, E, S>(kernels_, pixels, key_parts_[i], nullptr, r.reduced_key, rows,
                                          true);
            multiply<Kernels<T, E>, E, S>(kernels_, pixels, value_parts_[i],
                                          i ? nullptr : value_reduce_bias_.data(), r.reduced_value, rows,
                                          i > 0);
        }
        project(r.reduced_key, 2 * t_.channels, key_, rows, r.key_scales.data(), r.key, r.copy);
        project(r.reduced_value, t_.channels, value_, rows, r.value_scales.data(), r.value, r.copy);
    }

    /// Rows of values += their bias.
    void add_value_bias(Tile<S> value, int64_t rows) const {
        for (int64_t p = 0; p < value_.panels(); ++p)
            kernels_.add_rows(value_bias_.data() + p * kPanel, 0, rows, nullptr, value.panel(p));
    }

  private:
    void project(Tile<S> reduced, int64_t columns, const Factor<E>& weight, int64_t rows, S* scales,
                 Tile<S> to, OwnTile<E>& copy) const {
        kernels_.dot_rows(reduced, reduced, rows, panels_of(columns), scales);
        for (int64_t row = 0; row < rows; ++row)
            scales[row] = 1 / std::sqrt(scales[row] / static_cast<S>(columns) + eps_);
        multiply<Kernels<T, E>, E, S>(kernels_, rounded(kernels_, reduced, columns, rows, copy), weight,
                                      nullptr, to, rows);
        for (int64_t p = 0; p < weight.panels(); ++p) kernels_.rescale(to.panel(p), rows, scales);
    }

    const Tensors& t_;
    const S eps_;
    const Kernels<T, E>& kernels_;
    const Factor<E> key_, value_;
    const Lines<S> value_bias_, value_reduce_bias_;
    std::vector<Factor<E>> key_parts_, value_parts_;
};

/// A class's keys [width, N_kv] and values [N_kv, width], head by head.
template <typename E>
struct Memory {
    explicit Memory(const Tensors& t) {
        for (int64_t head = 0; head < t.heads.count; ++head) {
            keys.emplace_back(t.heads.width, t.windows);
            values.emplace_back(t.windows, t.heads.width);
        }
    }
    std::vector<Factor<E>> keys, values;
};

template <typename T, typename E>
class Forward {
  public:
    using S = Computed<T>;

    Forward(const Tensors& t, double eps, const Kernels<T, E>& kernels, T* out, T* mixture, S* log_sums)
        : t_(t),
          eps_(static_cast<S>(eps)),
          kernels_(kernels),
          order_(t.order()),
          scales_(read_scales<S>(t.drop_path, t.batch * t.classes)),
          reduction_(t, eps, kernels),
          query_(t.query_weight().template forward<E>()),
          out_(t.out_weight().template forward<E>()),
          out_bias_(read_bias<S>(t.out_bias, t.one())),
          tile_(queries_of_a_tile(t.windows)),
          to_(out),
          mixture_(mixture),
          log_sums_(log_sums) {}

    void run() {
        for (int64_t image = 0; image < t_.batch; ++image) {
            std::vector<Memory<E>> memory;
            for (int64_t i = 0; i < t_.classes; ++i) memory.emplace_back(t_);
            const int64_t chunks = divide_up(t_.windows, kWindows), tiles = divide_up(t_.pixels, tile_);
            torch::stable::parallel_for(0, t_.classes * chunks, 1, [&](int64_t begin, int64_t end) {
                typename Reduction<T, E>::Reduced reduced(t_, kWindows);
                const OwnTile<E> z(t_.parts() * kWindows, t_.channels);
                for (int64_t task = begin; task < end; ++task)
                    reduce(image, task / chunks, task % chunks * kWindows, z, reduced, memory[task / chunks]);
            });
            torch::stable::parallel_for(0, t_.classes * tiles, 1, [&](int64_t begin, int64_t end) {
                Workspace work(*this);
                for (int64_t task = begin; task < end; ++task)
                    attend(image, task / tiles, task % tiles * tile_, memory[task / tiles], work);
            });
        }
    }

  private:
    struct Workspace {
        explicit Workspace(const Forward& f)
            : z(f.tile_, f.t_.channels),
              query(f.tile_, f.t_.heads.columns()),
              mixture(f.tile_, f.t_.heads.columns()),
              out(f.tile_, f.t_.channels),
              log_sums(f.tile_),
              attention(f.t_.heads, f.t_.windows, f.tile_, f.kernels_) {
            if constexpr (!std::is_same_v<S, E>) copy = OwnTile<E>(f.tile_, f.t_.heads.columns());
        }
        OwnTile<E> z, copy;
        OwnTile<S> query, mixture, out;
        Buffer<S> log_sums;
        Attention<T, E> attention;
    };

    void normalize(int64_t map, int64_t first, int64_t rows, Tile<E> z) const {
        for (int64_t row = 0; row < rows; ++row)
            kernels_.normalize(data<T>(t_.x) + (map * t_.pixels + order_[first + row]) * t_.channels,
                               t_.channels, eps_, z.from_row(row), nullptr);
    }

    void reduce(int64_t image, int64_t index, int64_t first, Tile<E> z,
                typename Reduction<T, E>::Reduced& reduced, Memory<E>& memory) const {
        const int64_t rows = std::min(kWindows, t_.windows - first), map = image * t_.classes + index;
        for (int64_t i = 0; i < t_.parts(); ++i)
            normalize(map, i * t_.windows + first, rows, z.from_row(i * kWindows));
        const T* key_map = data<T>(t_.key_map) + (image * t_.windows + first) * 2 * t_.channels;
        reduction_.run(z, kWindows, key_map, rows, reduced);
        reduction_.add_value_bias(reduced.value, rows);
        transpose_heads<S, E>(reduced.key, t_.heads, first, rows, memory.keys);
        place_heads<S, E>(reduced.value, t_.heads, first, rows, memory.values);
    }

    void attend(int64_t image, int64_t index, int64_t first, const Memory<E>& memory, Workspace& work) const {
        const int64_t rows = std::min(tile_, t_.pixels - first), map = image * t_.classes + index;
        normalize(map, first, rows, work.z);
        for (int64_t row = 0; row < rows; ++row)
            load_heads(kernels_,
                       data<T>(t_.query_map) + (image * t_.pixels + order_[first + row]) * t_.channels,
                       t_.heads, S(1), work.query.tile().from_row(row));
        multiply<Kernels<T, E>, E, S>(kernels_, work.z, query_, nullptr, work.query, rows, true);
        const Tile<E> query = rounded(kernels_, work.query.tile(), t_.heads.columns(), rows, work.copy);
        for (int64_t head = 0; head < t_.heads.count; ++head) {
            const int64_t panel = head * t_.heads.panels();
            S* log_sums = log_sums_ ? log_sums_ + (map * t_.heads.count + head) * t_.pixels + first
                                    : work.log_sums.data();
            work.attention.run(query.from_panel(panel), memory.keys[head], memory.values[head], rows,
                               work.mixture.tile().from_panel(panel), log_sums);
        }
        const Tile<E> mixture = rounded(kernels_, work.mixture.tile(), t_.heads.columns(), rows, work.copy);
        multiply(kernels_, mixture, out_, out_bias_.data(), work.out.tile(), rows);
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t at = (map * t_.pixels + order_[first + row]) * t_.channels;
            kernels_.store(work.out.tile().from_row(row), t_.channels, scales_[map], data<T>(t_.x) + at,
                           to_ + at);
        }
        if (mixture_) keep(work.mixture, (map * t_.pixels + first) * t_.channels, rows);
    }

    void keep(Tile<S> mixture, int64_t at, int64_t rows) const {
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t head = 0; head < t_.heads.count; ++head)
                kernels_.store(mixture.from_row(row).from_panel(head * t_.heads.panels()), t_.heads.width,
                               S(1), nullptr, mixture_ + at + row * t_.channels + head * t_.heads.width);
    }

    const Tensors& t_;
    const S eps_;
    const Kernels<T, E>& kernels_;
    const std::vector<int64_t> order_;
    const std::vector<S> scales_;
    const Reduction<T, E> reduction_;
    const Factor<E> query_, out_;
    const Lines<S> out_bias_;
    const int64_t tile_;
    T *const to_, *const mixture_;
    S* const log_sums_;
};

/// Gradients in the order of the arguments: x, query_map, key_map, then weights.
template <typename T>
class Backward {
  public:
    using S = Computed<T>;

    Backward(const Tensors& t, double eps, const Tensor& grad, const Tensor& mixture, const Tensor& log_sums)
        : t_(t),
          eps_(static_cast<S>(eps)),
          order_(t.order()),
          scales_(read_scales<S>(t.drop_path, t.batch * t.classes)),
          reduction_(t, eps, kernels_),
          query_(t.query_weight().template forward<S>()),
          query_back_(t.query_weight().template backward<S>()),
          key_back_(t.key_weight().template backward<S>()),
          value_back_(t.value_weight().template backward<S>()),
          out_back_(t.out_weight().template backward<S>()),
          tile_(queries_of_a_tile(t.windows)),
          grad_(data<T>(grad)),
          mixture_(data<T>(mixture)),
          log_sums_(data<S>(log_sums)) {
        for (int64_t i = 0; i < t.parts(); ++i) {
            key_parts_back_.push_back(t.key_part(i).template backward<S>());
            value_parts_back_.push_back(t.value_part(i).template backward<S>());
        }
        d_query_ = weights_.take(t.heads, t.one());
        for (int64_t i = 0; i < t.parts(); ++i) d_key_parts_.push_back(weights_.take(t.two(), t.one()));
        d_key_ = weights_.take(t.heads, t.two());
        for (int64_t i = 0; i < t.parts(); ++i) d_value_parts_.push_back(weights_.take(t.one(), t.one()));
        d_value_reduce_bias_ = weights_.take(t.one());
        d_value_ = weights_.take(t.heads, t.one());
        d_value_bias_ = weights_.take(t.heads);
        d_out_ = weights_.take(t.one(), t.heads);
        d_out_bias_ = weights_.take(t.one());
        d_query_map_ = maps_.take(Heads::none(t.pixels), t.heads);
        d_key_map_ = maps_.take(Heads::none(t.windows), t.two());
    }

    void run(const std::vector<Tensor>& gradients) {
        const int64_t groups = std::min(t_.classes, kGroups);
        Totals<S> weights(groups, weights_.size()), maps(groups, maps_.size());
        for (int64_t image = 0; image < t_.batch; ++image) {
            torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
                Workspace work(*this);
                for (int64_t group = begin; group < end; ++group) {
                    S* sums = image ? weights.group(group) : weights.start(group);
                    S* of_maps = maps.start(group);
                    const auto [from, to] = part(t_.classes, group, groups);
                    for (int64_t i = from; i < to; ++i)
                        run_class(image, image * t_.classes + i, work, sums, of_maps,
                                  mutable_data<T>(gradients[0]));
                }
            });
            maps.add_up();
            write_maps(maps, image, mutable_data<T>(gradients[1]), mutable_data<T>(gradients[2]));
        }
        weights.add_up();
        weights.write(d_query_, gradients[3]);
        for (int64_t i = 0; i < t_.parts(); ++i) {
            weights.write(d_key_parts_[i], gradients[4], i * t_.channels);
            weights.write(d_value_parts_[i], gradients[6], i * t_.channels);
        }
        weights.write(d_key_, gradients[5]);
        weights.write(d_value_reduce_bias_, gradients[7]);
        weights.write(d_value_, gradients[8]);
        weights.write(d_value_bias_, gradients[9]);
        weights.write(d_out_, gradients[10]);
        weights.write(d_out_bias_, gradients[11]);
    }

  private:
    struct Workspace {
        explicit Workspace(const Backward& b)
            : z(b.t_.pixels, b.t_.channels),
              dz(b.t_.pixels, b.t_.channels),
              deviations(b.t_.pixels),
              reduced(b.t_, b.t_.windows),
              keys(b.t_),
              values(b.t_),
              d_key(b.t_.windows, b.t_.heads.columns()),
              d_value(b.t_.windows, b.t_.heads.columns()),
              d_reduced(b.t_.windows, 2 * b.t_.channels),
              dots(b.t_.windows),
              grad(b.tile_, b.t_.channels),
              mixture(b.tile_, b.t_.heads.columns()),
              query(b.tile_, b.t_.heads.columns()),
              d_mixture(b.tile_, b.t_.heads.columns()),
              d_query(b.tile_, b.t_.heads.columns()),
              log_sums(b.tile_),
              attention(b.t_.heads, b.t_.windows, b.tile_, b.kernels_) {}
        OwnTile<S> z, dz;
        Buffer<S> deviations;
        typename Reduction<T, S>::Reduced reduced;
        Memory<S> keys, values;  // of both, the transposed ones
        OwnTile<S> d_key, d_value, d_reduced;
        Buffer<S> dots;
        OwnTile<S> grad, mixture, query, d_mixture, d_query;
        Buffer<S> log_sums;
        AttentionBackward<T> attention;
    };

    void run_class(int64_t image, int64_t map, Workspace& work, S* sums, S* maps, T* d_x) const {
        const int64_t channels = t_.channels, windows = t_.windows;
        for (int64_t row = 0; row < t_.pixels; ++row)
            kernels_.normalize(data<T>(t_.x) + (map * t_.pixels + order_[row]) * channels, channels, eps_,
                               work.z.tile().from_row(row), work.deviations.data() + row);
        const T* key_map = data<T>(t_.key_map) + image * windows * 2 * channels;
        reduction_.run(work.z, windows, key_map, windows, work.reduced);
        transpose_heads<S, S>(work.reduced.key, t_.heads, 0, windows, work.keys.keys);
        // Values with their bias while they are read, and without it for the gradient of their scale.
        Tile<S> value = work.d_value;
        for (int64_t p = 0; p < panels_of(t_.heads.columns()); ++p)
            std::copy(work.reduced.value.panel(p), work.reduced.value.panel(p) + windows * kPanel,
                      value.panel(p));
        reduction_.add_value_bias(value, windows);
        transpose_heads<S, S>(value, t_.heads, 0, windows, work.values.keys);
        for (int64_t p = 0; p < panels_of(t_.heads.columns()); ++p) {
            std::fill(work.d_key.panel(p), work.d_key.panel(p) + windows * kPanel, S(0));
            std::fill(work.d_value.panel(p), work.d_value.panel(p) + windows * kPanel, S(0));
        }
        for (int64_t first = 0; first < t_.pixels; first += tile_)
            run_tile(image, map, first, std::min(tile_, t_.pixels - first), work, sums, maps);
        unscale(work, work.d_key, work.reduced.key, work.reduced.key_scales.data(), work.reduced.reduced_key,
                t_.two(), key_back_, d_key_, sums);
        finish(work, key_parts_back_, d_key_parts_, sums);
        d_key_map_.add_rows(kernels_, work.d_reduced.tile(), 0, windows, maps);
        d_value_bias_.sum_rows(backward_, work.d_value.tile(), windows, sums);
        unscale(work, work.d_value, work.reduced.value, work.reduced.value_scales.data(),
                work.reduced.reduced_value, t_.one(), value_back_, d_value_, sums);
        finish(work, value_parts_back_, d_value_parts_, sums);
        d_value_reduce_bias_.sum_rows(backward_, work.d_reduced.tile(), windows, sums);
        for (int64_t row = 0; row < t_.pixels; ++row) {
            const int64_t at = (map * t_.pixels + order_[row]) * channels;
            backward_.normalize(work.dz.tile().from_row(row), work.z.tile().from_row(row), channels,
                                work.deviations.data()[row], grad_ + at, d_x + at);
        }
    }

    /// From the gradient of the output to that of queries, keys and values.
    void run_tile(int64_t image, int64_t map, int64_t first, int64_t rows, Workspace& work, S* sums,
                  S* maps) const {
        const Tile<S> z = work.z.tile().from_row(first), grad = work.grad, mixture = work.mixture,
                      query = work.query;
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t pixel = order_[first + row];
            kernels_.load(grad_ + (map * t_.pixels + pixel) * t_.channels, t_.channels, scales_[map],
                          grad.from_row(row));
            load_heads(kernels_, mixture_ + (map * t_.pixels + first + row) * t_.channels, t_.heads, S(1),
                       mixture.from_row(row));
            load_heads(kernels_, data<T>(t_.query_map) + (image * t_.pixels + pixel) * t_.channels, t_.heads,
                       S(1), query.from_row(row));
        }
        d_out_.add(kernels_, grad, mixture, rows, sums);
        d_out_bias_.sum_rows(backward_, grad, rows, sums);
        multiply<Kernels<T, S>, S, S>(kernels_, grad, out_back_, nullptr, work.d_mixture, rows);
        multiply<Kernels<T, S>, S, S>(kernels_, z, query_, nullptr, query, rows, true);
        for (int64_t head = 0; head < t_.heads.count; ++head) {
            const int64_t panel = head * t_.heads.panels();
            const S* log_sums = log_sums_ + (map * t_.heads.count + head) * t_.pixels + first;
            std::copy(log_sums, log_sums + rows, work.log_sums.data());
            work.attention.run_backward(
                {query.from_panel(panel), work.d_mixture.tile().from_panel(panel), work.keys.keys[head],
                 work.values.keys[head], work.reduced.key.tile().from_panel(panel), work.log_sums.data(),
                 work.d_query.tile().from_panel(panel), work.d_key.tile().from_panel(panel),
                 work.d_value.tile().from_panel(panel)},
                rows);
        }
        d_query_.add(kernels_, work.d_query.tile(), z, rows, sums);
        multiply<Kernels<T, S>, S, S>(kernels_, work.d_query, query_back_, nullptr,
                                      work.dz.tile().from_row(first), rows);
        d_query_map_.add_rows(kernels_, work.d_query.tile(), first, rows, maps);
    }

    /// Backward through reduced * its inverse root mean square @ weight, into work.d_reduced.
    void unscale(Workspace& work, Tile<S> grad, Tile<S> scaled, const S* scales, Tile<S> reduced,
                 const Heads& inputs, const Factor<S>& weight, const Gradient& d_weight, S* sums) const {
        const int64_t rows = t_.windows;
        kernels_.dot_rows(grad, scaled, rows, panels_of(t_.heads.columns()), work.dots.data());
        for (int64_t p = 0; p < panels_of(t_.heads.columns()); ++p)
            kernels_.rescale(grad.panel(p), rows, scales);
        d_weight.add(kernels_, grad, reduced, rows, sums);
        multiply<Kernels<T, S>, S, S>(kernels_, grad, weight, nullptr, work.d_reduced, rows);
        for (int64_t row = 0; row < rows; ++row)
            work.dots.data()[row] *= -scales[row] * scales[row] / static_cast<S>(inputs.channels());
        for (int64_t p = 0; p < panels_of(inputs.channels()); ++p)
            kernels_.add_rows(reduced.panel(p), kPanel, rows, work.dots.data(), work.d_reduced.panel(p));
    }

    /// From work.d_reduced to the pixels of the windows.
    void finish(Workspace& work, const std::vector<Factor<S>>& parts, const std::vector<Gradient>& d_parts,
                S* sums) const {
        for (int64_t i = 0; i < t_.parts(); ++i) {
            d_parts[i].add(kernels_, work.d_reduced.tile(), work.z.tile().from_row(i * t_.windows),
                           t_.windows, sums);
            multiply<Kernels<T, S>, S, S>(kernels_, work.d_reduced, parts[i], nullptr,
                                          work.dz.tile().from_row(i * t_.windows), t_.windows, true);
        }
    }

    void write_maps(const Totals<S>& totals, int64_t image, T* d_query_map, T* d_key_map) const {
        for (int64_t row = 0; row < t_.pixels; ++row)
            for (int64_t c = 0; c < t_.channels; ++c)
                d_query_map[(image * t_.pixels + order_[row]) * t_.channels + c] =
                    narrow<T>(totals.at(d_query_map_.index(row, c)));
        for (int64_t row = 0; row < t_.windows; ++row)
            for (int64_t c = 0; c < 2 * t_.channels; ++c)
                d_key_map[(image * t_.windows + row) * 2 * t_.channels + c] =
                    narrow<T>(totals.at(d_key_map_.index(row, c)));
    }

    const Tensors& t_;
    const S eps_;
    const Kernels<T, S> kernels_ = kernels<T>();
    const BackwardKernels<T> backward_ = backward_kernels<T>();
    const std::vector<int64_t> order_;
    const std::vector<S> scales_;
    const Reduction<T, S> reduction_;
    const Factor<S> query_, query_back_, key_back_, value_back_, out_back_;
    std::vector<Factor<S>> key_parts_back_, value_parts_back_;
    const int64_t tile_;
    const T *const grad_, *const mixture_;
    const S* const log_sums_;
    Places weights_, maps_;
    Gradient d_query_, d_key_, d_value_reduce_bias_, d_value_, d_value_bias_, d_out_, d_out_bias_,
        d_query_map_, d_key_map_;
    std::vector<Gradient> d_key_parts_, d_value_parts_;
};

Tensors make_tensors(const Tensor& x, const Tensor& query_map, const Tensor& key_map,
                     const Tensor& query_weight, const Tensor& key_reduce_weight, const Tensor& key_weight,
                     const Tensor& value_reduce_weight, const Tensor& value_reduce_bias,
                     const Tensor& value_weight, const Tensor& value_bias, const Tensor& out_weight,
                     const Tensor& out_bias, const std::optional<Tensor>& drop_path, int64_t num_heads) {
    Tensors t{as_contiguous(x),
              as_contiguous(query_map),
              as_contiguous(key_map),
              as_contiguous(query_weight),
              as_contiguous(key_reduce_weight),
              as_contiguous(key_weight),
              as_contiguous(value_reduce_weight),
              as_contiguous(value_reduce_bias),
              as_contiguous(value_weight),
              as_contiguous(value_bias),
              as_contiguous(out_weight),
              as_contiguous(out_bias),
              std::nullopt};
    if (drop_path) t.drop_path = as_contiguous(*drop_path);
    for (const Tensor* map : {&t.query_map, &t.key_map})
        expect(map->scalar_type() == t.x.scalar_type(), "maps in the dtype of x", *map);
    t.check(num_heads);
    return t;
}

std::tuple<Tensor, Tensor, Tensor> spatial_attention_cpu(
    const Tensor& x, const Tensor& query_map, const Tensor& key_map, const Tensor& query_weight,
    const Tensor& key_reduce_weight, const Tensor& key_weight, const Tensor& value_reduce_weight,
    const Tensor& value_reduce_bias, const Tensor& value_weight, const Tensor& value_bias,
    const Tensor& out_weight, const Tensor& out_bias, const std::optional<Tensor>& drop_path,
    int64_t num_heads, double eps, bool training) {
    const Tensors t =
        make_tensors(x, query_map, key_map, query_weight, key_reduce_weight, key_weight, value_reduce_weight,
                     value_reduce_bias, value_weight, value_bias, out_weight, out_bias, drop_path, num_heads);
    Tensor out = torch::stable::empty_like(t.x), mixture = empty(t.x, {0}, t.x.scalar_type()),
           log_sums = empty(t.x, {0}, score_dtype(t.x));
    if (training) {
        mixture = empty(t.x, {t.batch, t.classes, t.pixels, t.channels}, t.x.scalar_type());
        log_sums = empty(t.x, {t.batch, t.classes, num_heads, t.pixels}, score_dtype(t.x));
    }
    if (t.x.numel() == 0) return {out, mixture, log_sums};
    visit_floating(t.x, "x", [&](auto tag) {
        using T = typename decltype(tag)::type;
        using S = Computed<T>;
        const auto run = [&]<typename E>(const Kernels<T, E>& table) {
            Forward<T, E>(t, eps, table, mutable_data<T>(out), training ? mutable_data<T>(mixture) : nullptr,
                          training ? mutable_data<S>(log_sums) : nullptr)
                .run();
        };
        // The backward pass finds log sums of scores that nothing was rounded for.
        training ? run(kernels<T>()) : with_kernels<T>(run);
    });
    return {out, mixture, log_sums};
}

std::vector<Tensor> spatial_attention_cpu_bwd(const Tensor& grad_in, const Tensor& x, const Tensor& query_map,
                                              const Tensor& key_map, const Tensor& query_weight,
                                              const Tensor& key_reduce_weight, const Tensor& key_weight,
                                              const Tensor& value_reduce_weight,
                                              const Tensor& value_reduce_bias, const Tensor& value_weight,
                                              const Tensor& value_bias, const Tensor& out_weight,
                                              const Tensor& out_bias, const std::optional<Tensor>& drop_path,
                                              int64_t num_heads, double eps, const Tensor& mixture,
                                              const Tensor& log_sums, const std::vector<bool>&) {
    const Tensors t =
        make_tensors(x, query_map, key_map, query_weight, key_reduce_weight, key_weight, value_reduce_weight,
                     value_reduce_bias, value_weight, value_bias, out_weight, out_bias, drop_path, num_heads);
    const Tensor grad = as_contiguous(grad_in);
    expect(grad.numel() == t.x.numel() && grad.scalar_type() == t.x.scalar_type(), "grad like x", grad);
    std::vector<Tensor> gradients{torch::stable::empty_like(t.x)};
    for (const Tensor* tensor : {&t.query_map, &t.key_map, &t.query, &t.key_reduce, &t.key, &t.value_reduce,
                                 &t.value_reduce_bias, &t.value, &t.value_bias, &t.out, &t.out_bias})
        gradients.push_back(torch::stable::new_zeros(*tensor, tensor->sizes()));
    if (t.x.numel() == 0) return gradients;
    visit_floating(t.x, "x", [&](auto tag) {
        using T = typename decltype(tag)::type;
        Backward<T>(t, eps, grad, as_contiguous(mixture), as_contiguous(log_sums)).run(gradients);
    });
    return gradients;
}

}  // namespace
}  // namespace errseg

STABLE_TORCH_LIBRARY_IMPL(errseg, CPU, m) {
    m.impl("spatial_attention_cpu", TORCH_BOX(&errseg::spatial_attention_cpu));
    m.impl("spatial_attention_cpu_bwd", TORCH_BOX(&errseg::spatial_attention_cpu_bwd));
}
