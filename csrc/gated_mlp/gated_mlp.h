#pragma once
// The gated MLP on tiles of tokens that are normalised already, forward and backward.
#include "common/panels.h"

namespace errseg {

/// Its weights as torch has them.
struct GatedMlpTensors {
    Tensor gate_weight, gate_bias, value_weight, value_bias, out_weight, out_bias;
    Heads channels, hidden;

    GatedMlpTensors(const Tensor& gate_weight_in, const Tensor& gate_bias_in, const Tensor& value_weight_in,
                    const Tensor& value_bias_in, const Tensor& out_weight_in, const Tensor& out_bias_in)
        : gate_weight(as_contiguous(gate_weight_in)),
          gate_bias(as_contiguous(gate_bias_in)),
          value_weight(as_contiguous(value_weight_in)),
          value_bias(as_contiguous(value_bias_in)),
          out_weight(as_contiguous(out_weight_in)),
          out_bias(as_contiguous(out_bias_in)),
          channels(Heads::none(gate_weight.size(1))),
          hidden(Heads::none(gate_weight.size(0))) {
        const int64_t c = channels.channels(), m = hidden.channels();
        expect(gate_weight.dim() == 2, "gate_weight [M, C]", gate_weight);
        expect(gate_bias.numel() == m, "gate_bias [M]", gate_bias);
        expect(value_weight.dim() == 2 && value_weight.size(0) == m && value_weight.size(1) == c,
               "value_weight like gate_weight", value_weight);
        expect(value_bias.numel() == m, "value_bias [M]", value_bias);
        expect(out_weight.dim() == 2 && out_weight.size(0) == c && out_weight.size(1) == m,
               "out_weight [C, M]", out_weight);
        expect(out_bias.numel() == c, "out_bias [C]", out_bias);
    }
    Weight gate() const { return {gate_weight, hidden, channels}; }
    Weight value() const { return {value_weight, hidden, channels}; }
    Weight out() const { return {out_weight, channels, hidden}; }
};

template <typename T, typename E>
class GatedMlp {
  public:
    using S = Computed<T>;

    GatedMlp(const GatedMlpTensors& tensors, const Kernels<T, E>& kernels)
        : kernels_(kernels),
          gate_(tensors.gate().forward<E>()),
          value_(tensors.value().forward<E>()),
          out_(tensors.out().forward<E>()),
          gate_bias_(read_bias<S>(tensors.gate_bias, tensors.hidden)),
          value_bias_(read_bias<S>(tensors.value_bias, tensors.hidden)),
          out_bias_(read_bias<S>(tensors.out_bias, tensors.channels)) {}

    struct Workspace {
        Workspace(const GatedMlp& mlp, int64_t rows)
            : units(rows, 2 * kPanel), hidden(rows, mlp.gate_.panels() * kPanel) {}
        OwnTile<S> units;
        OwnTile<E> hidden;
    };

    /// What goes into ReLU6 and what it is multiplied by, [rows, M] each.
    struct Units {
        Tile<S> gate, value;
    };

    /// out [rows, C] of z [rows, C]; the units are left in `kept` where that is given.
    void run(Tile<E> z, Tile<S> out, int64_t rows, Workspace& work, const Units* kept = nullptr) const {
        for (int64_t p = 0; p < gate_.panels(); ++p) {
            S* gate = kept ? kept->gate.panel(p) : work.units.panel(0);
            S* value = kept ? kept->value.panel(p) : work.units.panel(1);
            multiply(z, gate_, gate_bias_, p, gate, rows);
            multiply(z, value_, value_bias_, p, value, rows);
            kernels_.gate(gate, value, rows * kPanel, work.hidden.panel(p));
        }
        errseg::multiply(kernels_, work.hidden.tile(), out_, out_bias_.data(), out, rows);
    }

  private:
    void multiply(Tile<E> z, const Factor<E>& factor, const Lines<S>& bias, int64_t p, S* to,
                  int64_t rows) const {
        kernels_.multiply({z.data, kPanel, 1, z.stride, factor.panel(p), bias.data() + p * kPanel, to, rows,
                           factor.depth(), false});
    }

    const Kernels<T, E>& kernels_;
    const Factor<E> gate_, value_, out_;
    const Lines<S> gate_bias_, value_bias_, out_bias_;
};

template <typename T>
class GatedMlpBackward {
  public:
    using S = Computed<T>;

    GatedMlpBackward(const GatedMlpTensors& tensors, const Kernels<T, S>& kernels, Places& places)
        : kernels_(kernels),
          backward_(backward_kernels<T>()),
          gate_(tensors.gate().forward<S>()),
          value_(tensors.value().forward<S>()),
          gate_back_(tensors.gate().backward<S>()),
          value_back_(tensors.value().backward<S>()),
          out_back_(tensors.out().backward<S>()),
          gate_bias_(read_bias<S>(tensors.gate_bias, tensors.hidden)),
          value_bias_(read_bias<S>(tensors.value_bias, tensors.hidden)),
          d_gate_weight(places.take(tensors.hidden, tensors.channels)),
          d_gate_bias(places.take(tensors.hidden)),
          d_value_weight(places.take(tensors.hidden, tensors.channels)),
          d_value_bias(places.take(tensors.hidden)),
          d_out_weight(places.take(tensors.channels, tensors.hidden)),
          d_out_bias(places.take(tensors.channels)) {}

    struct Workspace {
        Workspace(const GatedMlpBackward& mlp, int64_t rows)
            : gate(rows, mlp.gate_.panels() * kPanel),
              value(rows, mlp.gate_.panels() * kPanel),
              hidden(rows, kPanel) {}
        OwnTile<S> gate, value, hidden;
    };

    /// dz [rows, C] from that of the output; the weights' gradients are added to `sums`. The workspace may hold
    /// the units of z already.
    void run(Tile<S> z, Tile<S> grad, Tile<S> dz, int64_t rows, S* sums, Workspace& work,
             bool has_units = false) const {
        for (int64_t p = 0; p < gate_.panels(); ++p) {
            S *gate = work.gate.panel(p), *value = work.value.panel(p), *hidden = work.hidden.panel(0);
            if (!has_units) {
                multiply(z, gate_, gate_bias_.data() + p * kPanel, p, gate, rows);
                multiply(z, value_, value_bias_.data() + p * kPanel, p, value, rows);
            }
            multiply(grad, out_back_, nullptr, p, hidden, rows);
            backward_.gate(gate, value, hidden, rows * kPanel);
            add(d_out_weight, grad, work.hidden, p, rows, sums);
            backward_.sum_rows(gate, rows, sums + d_gate_bias.start + p * kPanel);
            backward_.sum_rows(value, rows, sums + d_value_bias.start + p * kPanel);
        }
        d_gate_weight.add(kernels_, work.gate.tile(), z, rows, sums);
        d_value_weight.add(kernels_, work.value.tile(), z, rows, sums);
        d_out_bias.sum_rows(backward_, grad, rows, sums);
        errseg::multiply(kernels_, work.gate.tile(), gate_back_, static_cast<S*>(nullptr), dz, rows);
        errseg::multiply(kernels_, work.value.tile(), value_back_, static_cast<S*>(nullptr), dz, rows, true);
    }

    /// The gradients of gate_weight ... out_bias.
    void write(const Totals<S>& totals, const Tensor* gradients) const {
        const Gradient* all[] = {&d_gate_weight, &d_gate_bias,  &d_value_weight,
                                 &d_value_bias,  &d_out_weight, &d_out_bias};
        for (int i = 0; i < 6; ++i) totals.write(*all[i], gradients[i]);
    }

  private:
    void multiply(Tile<S> a, const Factor<S>& factor, const S* bias, int64_t p, S* to, int64_t rows) const {
        kernels_.multiply(
            {a.data, kPanel, 1, a.stride, factor.panel(p), bias, to, rows, factor.depth(), false});
    }
    /// A panel of columns of a gradient.
    void add(const Gradient& gradient, Tile<S> left, Tile<S> right, int64_t p, int64_t rows, S* sums) const {
        for (int64_t m = 0; m < gradient.rows / kPanel; ++m)
            kernels_.multiply({left.panel(m), 1, kPanel, kPanel * kPanel, right.data, nullptr,
                               sums + gradient.start + (p * gradient.rows + m * kPanel) * kPanel, kPanel,
                               rows, true});
    }

    const Kernels<T, S>& kernels_;
    const BackwardKernels<T> backward_;
    const Factor<S> gate_, value_, gate_back_, value_back_, out_back_;
    const Lines<S> gate_bias_, value_bias_;
    const Gradient d_gate_weight, d_gate_bias, d_value_weight, d_value_bias, d_out_weight, d_out_bias;
};

}  // namespace errseg
