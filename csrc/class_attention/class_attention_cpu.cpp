// The class block of some pooled pixels at a time: attention among the classes of each, gated MLP, residuals.
//
// A tile's rows are its pixels, class by class; everything between pooling and result stays in the second cache.
#include <optional>
#include <tuple>

#include "common/attend.h"
#include "gated_mlp/gated_mlp.h"

namespace errseg {
namespace {

constexpr int64_t kRows = 128;  // of a tile, where there are not more classes

struct Tensors {
    Tensor query_text, key_text, query, key, value, value_bias, out, out_bias;
    GatedMlpTensors mlp;
    std::optional<Tensor> drop_attention, drop_mlp;

    int64_t batch, classes, height, width, channels, pixels;
    Heads heads;

    void check(const Tensor& x, int64_t num_heads) {
        expect(x.dim() == 5, "x [B, K, H, W, C]", x);
        batch = x.size(0), classes = x.size(1), height = x.size(2), width = x.size(3), channels = x.size(4);
        pixels = (height / 2) * (width / 2);
        STD_TORCH_CHECK(num_heads > 0 && channels % num_heads == 0, "expected num_heads that divides ",
                        channels, ", got ", num_heads);
        heads = {num_heads, channels / num_heads};
        for (const Tensor* text : {&query_text, &key_text})
            expect(text->numel() == batch * classes * channels && text->scalar_type() == x.scalar_type(),
                   "text terms [B, K, C] in the dtype of x", *text);
        for (const Tensor* weight : {&query, &key, &value, &out})
            expect(weight->numel() == channels * channels, "a weight [C, C]", *weight);
        for (const Tensor* bias : {&value_bias, &out_bias})
            expect(bias->numel() == channels, "a bias [C]", *bias);
        expect(mlp.channels.channels() == channels, "mlp_gate_weight [M, C]", mlp.gate_weight);
        for (const auto* mask : {&drop_attention, &drop_mlp})
            if (*mask) expect((*mask)->numel() == batch * pixels, "drop_path [B, H // 2, W // 2]", **mask);
    }

    int64_t pixels_of_a_tile() const { return std::max<int64_t>(1, kRows / classes); }
    int64_t tiles() const { return divide_up(pixels, pixels_of_a_tile()); }
    Heads one() const { return Heads::none(channels); }
    Weight query_weight() const { return {query, heads, one()}; }
    Weight key_weight() const { return {key, heads, one()}; }
    Weight value_weight() const { return {value, heads, one()}; }
    Weight out_weight() const { return {out, one(), heads}; }
};

/// Some pixels of an image.
struct Place {
    int64_t image, first, count;
};

/// Everything up to the input of the MLP.
template <typename T, typename E>
class Mixer {
  public:
    using S = Computed<T>;

    Mixer(const Tensors& t, double eps, const Kernels<T, E>& kernels)
        : t_(t),
          eps_(static_cast<S>(eps)),
          kernels_(kernels),
          query_(t.query_weight().template forward<E>()),
          key_(t.key_weight().template forward<E>()),
          value_(t.value_weight().template forward<E>()),
          out_(t.out_weight().template forward<E>()),
          value_bias_(read_bias<S>(t.value_bias, t.heads)),
          out_bias_(read_bias<S>(t.out_bias, t.one())),
          scales_(read_scales<S>(t.drop_attention, t.batch * t.pixels)) {}

    struct Workspace {
        Workspace(const Tensors& t, const Kernels<T, E>& kernels, int64_t rows, int64_t queries)
            : pooled(rows * t.channels),
              u(rows * t.channels),
              z(rows, t.channels),
              z2(rows, t.channels),
              query(rows, t.heads.columns()),
              key(rows, t.heads.columns()),
              value(rows, t.heads.columns()),
              mixture(rows, t.heads.columns()),
              out(rows, t.channels),
              deviations(rows),
              deviations2(rows),
              log_sums(t.heads.count * rows),
              attention(t.heads, t.classes, queries, kernels) {
            if constexpr (!std::is_same_v<S, E>) copy = OwnTile<E>(rows, t.heads.columns());
            for (int64_t head = 0; head < t.heads.count; ++head) {
                keys.emplace_back(t.heads.width, t.classes);
                values.emplace_back(t.classes, t.heads.width);
            }
        }
        Buffer<T> pooled, u;
        OwnTile<E> z, z2, copy;
        OwnTile<S> query, key, value, mixture, out;
        Buffer<S> deviations, deviations2, log_sums;  // the last [heads, rows]
        Attention<T, E> attention;
        std::vector<Factor<E>> keys, values;
    };

    /// From pooled rows to u and its LayerNorm z2.
    void run(const Place& at, int64_t queries, Workspace& work) const {
        const int64_t rows = at.count * t_.classes;
        normalize(work.pooled.data(), rows, work.z, work.deviations.data());
        add_text(t_.query_text, at, work.query);
        add_text(t_.key_text, at, work.key);
        multiply<Kernels<T, E>, E, S>(kernels_, work.z, query_, nullptr, work.query, rows, true);
        multiply<Kernels<T, E>, E, S>(kernels_, work.z, key_, nullptr, work.key, rows, true);
        multiply<Kernels<T, E>, E, S>(kernels_, work.z, value_, value_bias_.data(), work.value, rows);
        const Tile<E> query = rounded(kernels_, work.query.tile(), t_.heads.columns(), rows, work.copy);
        for (int64_t pixel = 0; pixel < at.count; ++pixel)
            attend(query, pixel * t_.classes, rows, queries, work);
        const Tile<E> mixture = rounded(kernels_, work.mixture.tile(), t_.heads.columns(), rows, work.copy);
        multiply(kernels_, mixture, out_, out_bias_.data(), work.out.tile(), rows);
        for (int64_t row = 0; row < rows; ++row)
            kernels_.store(work.out.tile().from_row(row), t_.channels, scale(at, row),
                           work.pooled.data() + row * t_.channels, work.u.data() + row * t_.channels);
        normalize(work.u.data(), rows, work.z2, work.deviations2.data());
    }

    /// Of the attention's branch at a row.
    S scale(const Place& at, int64_t row) const {
        return scales_[at.image * t_.pixels + at.first + row / t_.classes];
    }

  private:
    void normalize(const T* from, int64_t rows, Tile<E> z, S* deviations) const {
        for (int64_t row = 0; row < rows; ++row)
            kernels_.normalize(from + row * t_.channels, t_.channels, eps_, z.from_row(row),
                               deviations + row);
    }

    void add_text(const Tensor& text, const Place& at, Tile<S> to) const {
        for (int64_t row = 0; row < at.count * t_.classes; ++row)
            load_heads(kernels_, data<T>(text) + (at.image * t_.classes + row % t_.classes) * t_.channels,
                       t_.heads, S(1), to.from_row(row));
    }

    void attend(Tile<E> query, int64_t first, int64_t rows, int64_t queries, Workspace& work) const {
        transpose_heads<S, E>(work.key.tile().from_row(first), t_.heads, 0, t_.classes, work.keys);
        place_heads<S, E>(work.value.tile().from_row(first), t_.heads, 0, t_.classes, work.values);
        for (int64_t head = 0; head < t_.heads.count; ++head)
            for (int64_t row = 0; row < t_.classes; row += queries)
                work.attention.run(
                    query.from_panel(head * t_.heads.panels()).from_row(first + row), work.keys[head],
                    work.values[head], std::min(queries, t_.classes - row),
                    work.mixture.tile().from_panel(head * t_.heads.panels()).from_row(first + row),
                    work.log_sums.data() + head * rows + first + row);
    }

    const Tensors& t_;
    const S eps_;
    const Kernels<T, E>& kernels_;
    const Factor<E> query_, key_, value_, out_;
    const Lines<S> value_bias_, out_bias_;
    const std::vector<S> scales_;
};

/// Where a row of a tile stands in a map [B, K, pixels].
int64_t row_of(const Tensors& t, const Place& at, int64_t row) {
    return (at.image * t.classes + row % t.classes) * t.pixels + at.first + row / t.classes;
}

/// The upper left of the four numbers' rows that a pooled row is the mean of, in a map [B, K, H, W].
int64_t corner_of(const Tensors& t, const Place& at, int64_t row) {
    const int64_t pixel = at.first + row / t.classes, columns = t.width / 2;
    return ((at.image * t.classes + row % t.classes) * t.height + pixel / columns * 2) * t.width +
           pixel % columns * 2;
}

template <typename T, typename E>
void forward(const Tensors& t, const T* x, double eps, const Kernels<T, E>& kernels, T* out, T* pooled) {
    using S = Computed<T>;
    const Mixer<T, E> mixer(t, eps, kernels);
    const GatedMlp<T, E> mlp(t.mlp, kernels);
    const std::vector<S> scales = read_scales<S>(t.drop_mlp, t.batch * t.pixels);
    const int64_t most = t.pixels_of_a_tile(), c = t.channels;
    const int64_t queries = std::min(t.classes, queries_of_a_tile(t.classes));
    torch::stable::parallel_for(0, t.batch * t.tiles(), 1, [&](int64_t begin, int64_t end) {
        typename Mixer<T, E>::Workspace work(t, kernels, most * t.classes, queries);
        typename GatedMlp<T, E>::Workspace units(mlp, most * t.classes);
        for (int64_t task = begin; task < end; ++task) {
            const int64_t first = task % t.tiles() * most;
            const Place at{task / t.tiles(), first, std::min(most, t.pixels - first)};
            const int64_t rows = at.count * t.classes;
            for (int64_t row = 0; row < rows; ++row) {
                T* to = work.pooled.data() + row * c;
                kernels.pool(x + corner_of(t, at, row) * c, t.width * c, c, to);
                if (pooled) std::copy(to, to + c, pooled + row_of(t, at, row) * c);
            }
            mixer.run(at, queries, work);
            mlp.run(work.z2, work.out, rows, units);
            for (int64_t p = 0; p < panels_of(c); ++p) kernels.relu6(work.out.panel(p), rows * kPanel);
            for (int64_t row = 0; row < rows; ++row)
                kernels.store(work.out.tile().from_row(row), c,
                              scales[at.image * t.pixels + at.first + row / t.classes],
                              work.u.data() + row * c, out + row_of(t, at, row) * c);
        }
    });
}

/// Gradients of x, query_text, key_text, then weights.
template <typename T>
class Backward {
  public:
    using S = Computed<T>;

    Backward(const Tensors& t, double eps, const Tensor& grad, const Tensor& pooled)
        : t_(t),
          mixer_(t, eps, kernels_),
          mlp_(t.mlp, kernels_),
          query_(t.query_weight().template backward<S>()),
          key_(t.key_weight().template backward<S>()),
          value_(t.value_weight().template backward<S>()),
          out_(t.out_weight().template backward<S>()),
          scales_(read_scales<S>(t.drop_mlp, t.batch * t.pixels)),
          grad_(data<T>(grad)),
          pooled_(data<T>(pooled)),
          d_query_(places_.take(t.heads, t.one())),
          d_key_(places_.take(t.heads, t.one())),
          d_value_(places_.take(t.heads, t.one())),
          d_value_bias_(places_.take(t.heads)),
          d_out_(places_.take(t.one(), t.heads)),
          d_out_bias_(places_.take(t.one())),
          mlp_backward_(t.mlp, kernels_, places_),
          d_query_text_(texts_.take(Heads::none(t.classes), t.heads)),
          d_key_text_(texts_.take(Heads::none(t.classes), t.heads)) {}

    void run(const std::vector<Tensor>& gradients) {
        const int64_t groups = std::min(t_.tiles(), kGroups);
        Totals<S> weights(groups, places_.size()), texts(groups, texts_.size());
        for (int64_t image = 0; image < t_.batch; ++image) {
            torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
                Workspace work(*this);
                for (int64_t group = begin; group < end; ++group) {
                    S* sums = image ? weights.group(group) : weights.start(group);
                    S* of_texts = texts.start(group);
                    const auto [from, to] = part(t_.tiles(), group, groups);
                    for (int64_t tile = from; tile < to; ++tile) {
                        const int64_t first = tile * t_.pixels_of_a_tile();
                        const Place at{image, first, std::min(t_.pixels_of_a_tile(), t_.pixels - first)};
                        run_tile(at, work, sums, of_texts, mutable_data<T>(gradients[0]));
                    }
                }
            });
            texts.add_up();
            write_text(texts, d_query_text_, image, mutable_data<T>(gradients[1]));
            write_text(texts, d_key_text_, image, mutable_data<T>(gradients[2]));
        }
        weights.add_up();
        const Gradient* all[] = {&d_query_, &d_key_, &d_value_, &d_value_bias_, &d_out_, &d_out_bias_};
        for (int i = 0; i < 6; ++i) weights.write(*all[i], gradients[3 + i]);
        mlp_backward_.write(weights, &gradients[9]);
    }

  private:
    struct Workspace {
        explicit Workspace(const Backward& b) : Workspace(b, b.t_.pixels_of_a_tile() * b.t_.classes) {}
        Workspace(const Backward& b, int64_t rows)
            : queries(std::min(b.t_.classes, queries_of_a_tile(b.t_.classes))),
              mixer(b.t_, b.kernels_, rows, queries),
              mlp(b.mlp_, rows),
              mlp_backward(b.mlp_backward_, rows),
              attention(b.t_.heads, b.t_.classes, queries, b.kernels_),
              grad(rows, b.t_.channels),
              dz(rows, b.t_.channels),
              d_mixture(rows, b.t_.heads.columns()),
              d_query(rows, b.t_.heads.columns()),
              d_key(rows, b.t_.heads.columns()),
              d_value(rows, b.t_.heads.columns()),
              du(rows * b.t_.channels) {
            for (int64_t head = 0; head < b.t_.heads.count; ++head)
                values.emplace_back(b.t_.heads.width, b.t_.classes);
        }
        int64_t queries;
        typename Mixer<T, S>::Workspace mixer;
        typename GatedMlp<T, S>::Workspace mlp;
        typename GatedMlpBackward<T>::Workspace mlp_backward;
        AttentionBackward<T> attention;
        std::vector<Factor<S>> values;
        OwnTile<S> grad, dz, d_mixture, d_query, d_key, d_value;
        Buffer<T> du;
    };

    void run_tile(const Place& at, Workspace& work, S* sums, S* texts, T* d_x) const {
        const int64_t rows = at.count * t_.classes, c = t_.channels;
        auto& m = work.mixer;
        for (int64_t row = 0; row < rows; ++row) {
            const T* from = pooled_ + row_of(t_, at, row) * c;
            std::copy(from, from + c, m.pooled.data() + row * c);
        }
        mixer_.run(at, work.queries, m);
        run_mlp(at, rows, work, sums);
        run_attention(at, rows, work, sums, texts);
        for (int64_t row = 0; row < rows; ++row) {
            T* du = work.du.data() + row * c;
            backward_.normalize(work.dz.tile().from_row(row), m.z.tile().from_row(row), c,
                                m.deviations.data()[row], du, du);
            kernels_.load(du, c, S(0.25), work.grad.tile().from_row(row));
            T* to = d_x + corner_of(t_, at, row) * c;
            for (T* pixel : {to, to + c, to + t_.width * c, to + (t_.width + 1) * c})
                kernels_.store(work.grad.tile().from_row(row), c, S(1), nullptr, pixel);
        }
    }

    /// From the gradient of the result to that of u, in work.du.
    void run_mlp(const Place& at, int64_t rows, Workspace& work, S* sums) const {
        const int64_t c = t_.channels;
        auto& m = work.mixer;
        const typename GatedMlp<T, S>::Units units{work.mlp_backward.gate, work.mlp_backward.value};
        mlp_.run(m.z2, m.out, rows, work.mlp, &units);
        for (int64_t row = 0; row < rows; ++row)
            kernels_.load(grad_ + row_of(t_, at, row) * c, c,
                          scales_[at.image * t_.pixels + at.first + row / t_.classes],
                          work.grad.tile().from_row(row));
        for (int64_t p = 0; p < panels_of(c); ++p)
            backward_.relu6(m.out.panel(p), work.grad.panel(p), rows * kPanel);
        mlp_backward_.run(m.z2, work.grad, work.dz, rows, sums, work.mlp_backward, true);
        for (int64_t row = 0; row < rows; ++row)
            backward_.normalize(work.dz.tile().from_row(row), m.z2.tile().from_row(row), c,
                                m.deviations2.data()[row], grad_ + row_of(t_, at, row) * c,
                                work.du.data() + row * c);
    }

    /// From the gradient of u to that of z, in work.dz.
    void run_attention(const Place& at, int64_t rows, Workspace& work, S* sums, S* texts) const {
        auto& m = work.mixer;
        const Tile<S> grad = work.grad, z = m.z, d_query = work.d_query, d_key = work.d_key,
                      d_value = work.d_value;
        for (int64_t row = 0; row < rows; ++row)
            kernels_.load(work.du.data() + row * t_.channels, t_.channels, mixer_.scale(at, row),
                          grad.from_row(row));
        d_out_.add(kernels_, grad, m.mixture.tile(), rows, sums);
        d_out_bias_.sum_rows(backward_, grad, rows, sums);
        multiply<Kernels<T, S>, S, S>(kernels_, grad, out_, nullptr, work.d_mixture, rows);
        for (int64_t pixel = 0; pixel < at.count; ++pixel) attend(pixel * t_.classes, rows, work);
        d_query_.add(kernels_, d_query, z, rows, sums);
        d_key_.add(kernels_, d_key, z, rows, sums);
        d_value_.add(kernels_, d_value, z, rows, sums);
        d_value_bias_.sum_rows(backward_, d_value, rows, sums);
        for (int64_t pixel = 0; pixel < at.count; ++pixel) {
            const int64_t first = pixel * t_.classes;
            d_query_text_.add_rows(kernels_, d_query.from_row(first), 0, t_.classes, texts);
            d_key_text_.add_rows(kernels_, d_key.from_row(first), 0, t_.classes, texts);
        }
        multiply<Kernels<T, S>, S, S>(kernels_, d_query, query_, nullptr, work.dz, rows);
        multiply<Kernels<T, S>, S, S>(kernels_, d_key, key_, nullptr, work.dz, rows, true);
        multiply<Kernels<T, S>, S, S>(kernels_, d_value, value_, nullptr, work.dz, rows, true);
    }

    /// The classes of one pixel, which begins at row `first` out of `rows`.
    void attend(int64_t first, int64_t rows, Workspace& work) const {
        auto& m = work.mixer;
        transpose_heads<S, S>(m.key.tile().from_row(first), t_.heads, 0, t_.classes, m.keys);
        transpose_heads<S, S>(m.value.tile().from_row(first), t_.heads, 0, t_.classes, work.values);
        for (int64_t p = 0; p < panels_of(t_.heads.columns()); ++p)
            for (Tile<S> d : {work.d_key.tile().from_row(first), work.d_value.tile().from_row(first)})
                std::fill(d.panel(p), d.panel(p) + t_.classes * kPanel, S(0));
        for (int64_t head = 0; head < t_.heads.count; ++head) {
            const auto of_head = [&](Tile<S> tile, int64_t row) {
                return tile.from_panel(head * t_.heads.panels()).from_row(first + row);
            };
            for (int64_t row = 0; row < t_.classes; row += work.queries)
                work.attention.run_backward(
                    {of_head(m.query, row), of_head(work.d_mixture, row), m.keys[head], work.values[head],
                     of_head(m.key, 0), m.log_sums.data() + head * rows + first + row,
                     of_head(work.d_query, row), of_head(work.d_key, 0), of_head(work.d_value, 0)},
                    std::min(work.queries, t_.classes - row));
        }
    }

    void write_text(const Totals<S>& totals, const Gradient& text, int64_t image, T* to) const {
        for (int64_t i = 0; i < t_.classes; ++i)
            for (int64_t c = 0; c < t_.channels; ++c)
                to[(image * t_.classes + i) * t_.channels + c] = narrow<T>(totals.at(text.index(i, c)));
    }

    const Tensors& t_;
    const Kernels<T, S> kernels_ = kernels<T>();
    const BackwardKernels<T> backward_ = backward_kernels<T>();
    const Mixer<T, S> mixer_;
    const GatedMlp<T, S> mlp_;
    const Factor<S> query_, key_, value_, out_;
    const std::vector<S> scales_;
    const T *const grad_, *const pooled_;
    Places places_, texts_;
    const Gradient d_query_, d_key_, d_value_, d_value_bias_, d_out_, d_out_bias_;
    const GatedMlpBackward<T> mlp_backward_;
    const Gradient d_query_text_, d_key_text_;
};

Tensors make_tensors(const Tensor& x, const Tensor& query_text, const Tensor& key_text, const Tensor& query,
                     const Tensor& key, const Tensor& value, const Tensor& value_bias, const Tensor& out,
                     const Tensor& out_bias, const GatedMlpTensors& mlp,
                     const std::optional<Tensor>& drop_attention, const std::optional<Tensor>& drop_mlp,
                     int64_t num_heads) {
    Tensors t{as_contiguous(query_text),
              as_contiguous(key_text),
              as_contiguous(query),
              as_contiguous(key),
              as_contiguous(value),
              as_contiguous(value_bias),
              as_contiguous(out),
              as_contiguous(out_bias),
              mlp,
              std::nullopt,
              std::nullopt};
    if (drop_attention) t.drop_attention = as_contiguous(*drop_attention);
    if (drop_mlp) t.drop_mlp = as_contiguous(*drop_mlp);
    t.check(x, num_heads);
    return t;
}

std::tuple<Tensor, Tensor> class_attention_cpu(
    const Tensor& x_in, const Tensor& query_text, const Tensor& key_text, const Tensor& query_weight,
    const Tensor& key_weight, const Tensor& value_weight, const Tensor& value_bias, const Tensor& out_weight,
    const Tensor& out_bias, const Tensor& mlp_gate_weight, const Tensor& mlp_gate_bias,
    const Tensor& mlp_value_weight, const Tensor& mlp_value_bias, const Tensor& mlp_out_weight,
    const Tensor& mlp_out_bias, const std::optional<Tensor>& drop_attention,
    const std::optional<Tensor>& drop_mlp, int64_t num_heads, double eps, bool training) {
    const GatedMlpTensors mlp(mlp_gate_weight, mlp_gate_bias, mlp_value_weight, mlp_value_bias,
                              mlp_out_weight, mlp_out_bias);
    const Tensors t =
        make_tensors(x_in, query_text, key_text, query_weight, key_weight, value_weight, value_bias,
                     out_weight, out_bias, mlp, drop_attention, drop_mlp, num_heads);
    const Tensor x = as_contiguous(x_in);
    Tensor out = empty(x, {t.batch, t.classes, t.height / 2, t.width / 2, t.channels}, x.scalar_type());
    Tensor pooled = training ? torch::stable::empty_like(out) : empty(x, {0}, x.scalar_type());
    if (out.numel() == 0) return {out, pooled};
    visit_floating(x, "x", [&](auto tag) {
        using T = typename decltype(tag)::type;
        with_kernels<T>([&](const auto& table) {
            forward(t, data<T>(x), eps, table, mutable_data<T>(out),
                    training ? mutable_data<T>(pooled) : nullptr);
        });
    });
    return {out, pooled};
}

/// Of x the shape is read alone.
std::vector<Tensor> class_attention_cpu_bwd(
    const Tensor& grad_in, const Tensor& x, const Tensor& query_text, const Tensor& key_text,
    const Tensor& query_weight, const Tensor& key_weight, const Tensor& value_weight,
    const Tensor& value_bias, const Tensor& out_weight, const Tensor& out_bias, const Tensor& mlp_gate_weight,
    const Tensor& mlp_gate_bias, const Tensor& mlp_value_weight, const Tensor& mlp_value_bias,
    const Tensor& mlp_out_weight, const Tensor& mlp_out_bias, const std::optional<Tensor>& drop_attention,
    const std::optional<Tensor>& drop_mlp, int64_t num_heads, double eps, const Tensor& pooled_in,
    const std::vector<bool>&) {
    const GatedMlpTensors mlp(mlp_gate_weight, mlp_gate_bias, mlp_value_weight, mlp_value_bias,
                              mlp_out_weight, mlp_out_bias);
    const Tensors t =
        make_tensors(x, query_text, key_text, query_weight, key_weight, value_weight, value_bias, out_weight,
                     out_bias, mlp, drop_attention, drop_mlp, num_heads);
    const Tensor grad = as_contiguous(grad_in), pooled = as_contiguous(pooled_in);
    expect(grad.numel() == pooled.numel() && grad.scalar_type() == pooled.scalar_type(),
           "grad like the result", grad);
    std::vector<Tensor> gradients{
        empty(pooled, {t.batch, t.classes, t.height, t.width, t.channels}, pooled.scalar_type())};
    // What the pooling drops has no influence.
    if (t.height % 2 || t.width % 2 || pooled.numel() == 0) torch::stable::zero_(gradients[0]);
    for (const Tensor* tensor : {&t.query_text, &t.key_text, &t.query, &t.key, &t.value, &t.value_bias,
                                 &t.out, &t.out_bias, &mlp.gate_weight, &mlp.gate_bias, &mlp.value_weight,
                                 &mlp.value_bias, &mlp.out_weight, &mlp.out_bias})
        gradients.push_back(torch::stable::new_zeros(*tensor, tensor->sizes()));
    if (pooled.numel() == 0) return gradients;
    visit_floating(pooled, "x", [&](auto tag) {
        using T = typename decltype(tag)::type;
        Backward<T>(t, eps, grad, pooled).run(gradients);
    });
    return gradients;
}

}  // namespace
}  // namespace errseg

STABLE_TORCH_LIBRARY_IMPL(errseg, CPU, m) {
    m.impl("class_attention_cpu", TORCH_BOX(&errseg::class_attention_cpu));
    m.impl("class_attention_cpu_bwd", TORCH_BOX(&errseg::class_attention_cpu_bwd));
}
