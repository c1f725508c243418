// Ops that take tensors: what a decode step calls, without the Python that checks and unpacks arguments.
//
// A function here serves the calls that it fully understands: plain tensors on the CPU, of a type the kernels have,
// whose shapes, strides and values are as the op demands. For any other call it returns None, before writing anything,
// and the caller takes the long way through checks.py and cpu.py, which compute the result or raise an error. So
// every condition of checks.py is tested here too, but the messages are only there.
#include "direct.h"

#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "exchange.h"

namespace nb = nanobind;

namespace ibtpo {
namespace {

using nb::handle;
using nb::object;

// [T, H, D] with each token's [H, D] dense; tokens may lie apart, as in a view of a fused projection.
bool is_heads(const View& x, Kind kind, int64_t num_tokens, int64_t num_heads, int64_t head_dim) {
  return x.is(kind, {num_tokens, num_heads, head_dim}) && x.dense(2);
}

struct Pages {
  Pages(handle k_pages, handle v_pages) : k(k_pages), v(v_pages) {}
  // Whether both are [num_pages, page_size, Hkv, D], dense.
  bool fit(Kind kind, int64_t num_kv_heads, int64_t head_dim) const {
    return k.is(kind, {-1, -1, num_kv_heads, head_dim}) && k.dense() &&
           v.is(kind, {k.size(0), k.size(1), num_kv_heads, head_dim}) && v.dense();
  }
  int64_t num_slots() const { return k.size(0) * k.size(1); }
  const View k, v;
};

// Whether x is None, or [size].
bool is_weight(handle x, Kind kind, int64_t size) {
  if (x.is_none()) return true;
  const View view(x);
  return view.is(kind, {size}) && view.dense();
}

template <class T>
T* weight_of(handle x) {
  return x.is_none() ? nullptr : View(x).data<T>();
}

bool same_shape(const View& x, const View& y) {
  if (x.kind() != y.kind() || x.num_dims() != y.num_dims()) return false;
  for (int i = 0; i < x.num_dims(); ++i)
    if (x.size(i) != y.size(i)) return false;
  return true;
}

bool is_eps(float x) { return x >= 0 && std::isfinite(x); }

bool served(Kind kind) { return kind == Kind::f32 || kind == Kind::bf16; }

object append_kv(handle k, handle v, handle k_pages, handle v_pages, handle slots) {
  const View key(k), value(v), slot(slots);
  const Pages pages(k_pages, v_pages);
  const Kind kind = key.kind();
  if (!served(kind) || !key.is(kind, {-1, -1, -1}) || !key.dense(2)) return nb::none();
  const int64_t count = key.size(0), num_heads = key.size(1), head_dim = key.size(2);
  if (!is_heads(value, kind, count, num_heads, head_dim) || !pages.fit(kind, num_heads, head_dim) ||
      !slot.is(Kind::i64, {count}) || !slot.dense())
    return nb::none();
  const int64_t bytes = element_size(kind);
  const int64_t failed =
      append({key.data<char>(), value.data<char>(), pages.k.data<char>(), pages.v.data<char>(), slot.data<int64_t>(),
              count, num_heads * head_dim * bytes, key.stride(0) * bytes, value.stride(0) * bytes, pages.num_slots()});
  return failed < 0 ? nb::cast(true) : nb::none();
}

object rope_append(handle q, handle k, handle v, handle cos, handle sin, handle k_pages, handle v_pages, handle slots,
                   handle q_weight, handle k_weight, float eps) {
  const View query(q), key(k), value(v), cosine(cos), sine(sin), slot(slots);
  const Pages pages(k_pages, v_pages);
  const Kind kind = query.kind();
  if (!served(kind) || !query.is(kind, {-1, -1, -1}) || !query.dense(2) ||
      !key.is(kind, {query.size(0), -1, query.size(2)}) || !key.dense(2) || query.size(2) % 2 != 0)
    return nb::none();
  const int64_t count = query.size(0), num_heads = query.size(1), num_kv_heads = key.size(1), head_dim = query.size(2);
  if (!is_heads(value, kind, count, num_kv_heads, head_dim) || !cosine.is(Kind::f32, {count, head_dim / 2}) ||
      !cosine.dense() || !sine.is(Kind::f32, {count, head_dim / 2}) || !sine.dense() ||
      !pages.fit(kind, num_kv_heads, head_dim) || !slot.is(Kind::i64, {count}) || !slot.dense() ||
      !is_weight(q_weight, kind, head_dim) || !is_weight(k_weight, kind, head_dim) || !is_eps(eps))
    return nb::none();
  const Fresh out(kind, {count, num_heads, head_dim});
  const int64_t failed = by_element(kind == Kind::bf16, [&](const auto& ops, auto element) {
    using T = decltype(element);
    RopeAppendOf<T> call;
    call.q = query.data<T>(), call.k = key.data<T>(), call.v = value.data<T>();
    call.cos = cosine.data<float>(), call.sin = sine.data<float>();
    call.q_weight = weight_of<T>(q_weight), call.k_weight = weight_of<T>(k_weight);
    call.q_out = out.data<T>(), call.k_pages = pages.k.data<T>(), call.v_pages = pages.v.data<T>();
    call.slots = slot.data<int64_t>();
    call.num_tokens = count, call.num_heads = num_heads, call.num_kv_heads = num_kv_heads, call.head_dim = head_dim;
    call.q_stride = query.stride(0), call.k_stride = key.stride(0), call.v_stride = value.stride(0);
    call.num_slots = pages.num_slots(), call.eps = eps;
    return ops.rope_append(call);
  });
  return failed < 0 ? out.object() : nb::none();
}

// scale None: 1 / sqrt(D).
object tree_decode(handle q, handle k_pages, handle v_pages, handle page_table, handle rows, handle lengths,
                   handle items, int64_t page_size, handle scale) {
  const View query(q), table(page_table), row(rows), length(lengths), item(items);
  const Pages pages(k_pages, v_pages);
  const Kind kind = query.kind();
  if (!served(kind) || !query.is(kind, {-1, -1, -1}) || !query.dense() ||
      !pages.k.is(kind, {-1, page_size, -1, query.size(2)}))
    return nb::none();
  const int64_t count = query.size(0), num_heads = query.size(1), head_dim = query.size(2);
  const int64_t num_kv_heads = pages.k.size(2);
  if (num_heads == 0 || head_dim == 0 || !pages.fit(kind, num_kv_heads, head_dim) || num_kv_heads < 1 ||
      num_heads % num_kv_heads != 0 || !table.is(Kind::i32, {-1, -1}) || !table.dense() ||
      !row.is(Kind::i32, {count}) || !row.dense() || !length.is(Kind::i32, {count}) || !length.dense() ||
      !item.is(Kind::i32, {-1, 4}) || !item.dense())
    return nb::none();
  double factor = std::pow(static_cast<double>(head_dim), -0.5);
  if (!scale.is_none() && !(nb::try_cast<double>(scale, factor) && std::isfinite(factor))) return nb::none();
  if (kind == Kind::bf16 && (head_dim % 2 != 0 || page_size % 2 != 0)) return nb::none();
  const Fresh out(kind, {count, num_heads, head_dim});
  const auto run = [&](auto type, auto kernel) {
    using T = decltype(type);
    return kernel(Decode<T>{query.data<T>(), pages.k.data<T>(), pages.v.data<T>(), table.data<int32_t>(),
                            row.data<int32_t>(), length.data<int32_t>(), item.data<int32_t>(), out.data<T>(), count,
                            num_heads, num_kv_heads, head_dim, pages.k.size(0), page_size, table.size(0), table.size(1),
                            item.size(0), static_cast<float>(factor)});
  };
  int64_t failed;
  {
    const nb::gil_scoped_release release;
    failed = kind == Kind::bf16 ? run(bf16{}, current().tree_decode_bf16) : run(0.0f, current().tree_decode);
  }
  return failed < 0 ? out.object() : nb::none();
}

// Whether x is dense [..., H] and weight [H], of one served kind.
bool is_norm(const View& x, const View& weight) {
  return served(x.kind()) && x.num_dims() >= 1 && x.num_dims() <= kMaxDims && x.dense() &&
         weight.is(x.kind(), {x.size(x.num_dims() - 1)}) && weight.dense();
}

object rms_norm(handle x, handle weight, float eps) {
  const View input(x), scale(weight);
  if (!is_norm(input, scale) || !is_eps(eps)) return nb::none();
  const int64_t size = scale.size(0);
  const Fresh out = like(input);
  by_element(input.kind() == Kind::bf16, [&](const auto& ops, auto element) {
    using T = decltype(element);
    ops.rms_norm(input.data<T>(), scale.data<T>(), out.data<T>(), size > 0 ? input.count() / size : 0, size, eps);
  });
  return out.object();
}

object add_rms_norm(handle x, handle residual, handle weight, float eps) {
  const View input(x), other(residual), scale(weight);
  if (!is_norm(input, scale) || !same_shape(input, other) || !other.dense() || !is_eps(eps)) return nb::none();
  const int64_t size = scale.size(0);
  const Fresh out = like(input), total = like(input);
  by_element(input.kind() == Kind::bf16, [&](const auto& ops, auto element) {
    using T = decltype(element);
    ops.add_rms_norm(input.data<T>(), other.data<T>(), scale.data<T>(), out.data<T>(), total.data<T>(),
                     size > 0 ? input.count() / size : 0, size, eps);
  });
  return nb::make_tuple(out.object(), total.object());
}

object rope(handle x, handle cos, handle sin) {
  const View input(x), cosine(cos), sine(sin);
  if (!served(input.kind()) || !input.is(input.kind(), {-1, -1, -1}) || !input.dense() || input.size(2) % 2 != 0)
    return nb::none();
  const int64_t half = input.size(2) / 2;
  if (!cosine.is(Kind::f32, {input.size(0), half}) || !cosine.dense() || !sine.is(Kind::f32, {input.size(0), half}) ||
      !sine.dense())
    return nb::none();
  const Fresh out = like(input);
  by_element(input.kind() == Kind::bf16, [&](const auto& ops, auto element) {
    using T = decltype(element);
    ops.rope(input.data<T>(), cosine.data<float>(), sine.data<float>(), out.data<T>(), input.size(0), input.size(1),
             input.size(2), 1.0f);
  });
  return out.object();
}

// 2-D inputs may have rows that lie apart, as in the halves of a fused gate-up projection.
object silu_mul(handle gate, handle up) {
  const View g(gate), u(up);
  if (!served(g.kind()) || !same_shape(g, u) || g.num_dims() > kMaxDims) return nb::none();
  const bool rows = g.num_dims() == 2 && g.dense(1) && u.dense(1);
  if (!rows && !(g.dense() && u.dense())) return nb::none();
  const Fresh out = like(g);
  const int64_t num_rows = rows ? g.size(0) : 1, size = rows ? g.size(1) : g.count();
  by_element(g.kind() == Kind::bf16, [&](const auto& ops, auto element) {
    using T = decltype(element);
    ops.silu_mul(g.data<T>(), u.data<T>(), out.data<T>(), num_rows, size, rows ? g.stride(0) : size,
                 rows ? u.stride(0) : size);
  });
  return out.object();
}

// A sampling parameter, one value a row, from a number or a tensor [B].
template <class T>
class Column {
 public:
  Column(handle x, int64_t count) : values_(count) {
    if (PyLong_Check(x.ptr()) || (!std::is_integral_v<T> && PyFloat_Check(x.ptr()))) {
      T value;
      fine_ = nb::try_cast<T>(x, value);
      if (fine_) values_.assign(count, value);
      return;
    }
    const View view(x);
    fine_ = view.num_dims() == 1 && view.size(0) == count && view.dense() &&
            (read<int32_t>(view, Kind::i32) || read<int64_t>(view, Kind::i64) ||
             (!std::is_integral_v<T> && (read<float>(view, Kind::f32) || read<double>(view, Kind::f64))));
  }
  template <class Valid>
  bool all(Valid valid) const {
    bool result = fine_;
    for (const T value : values_) result = result && valid(value);
    return result;
  }
  const T* data() const { return values_.data(); }

 private:
  template <class Source>
  bool read(const View& view, Kind kind) {
    if (view.kind() != kind) return false;
    values_.assign(view.data<Source>(), view.data<Source>() + values_.size());
    return true;
  }
  std::vector<T> values_;
  bool fine_;
};

object sample(handle logits, handle keys, handle temperature, handle top_p, handle top_k, handle min_p) {
  const View z(logits), key(keys);
  if (!served(z.kind()) || !z.is(z.kind(), {-1, -1}) || !z.dense() || z.size(1) == 0 ||
      !key.is(Kind::i64, {z.size(0), 2}) || !key.dense())
    return nb::none();
  const int64_t count = z.size(0);
  const Column<double> temperatures(temperature, count), masses(top_p, count), floors(min_p, count);
  const Column<int64_t> counts(top_k, count);
  if (!temperatures.all([](double x) { return x >= 0 && std::isfinite(x); }) ||
      !masses.all([](double x) { return x > 0 && x <= 1; }) || !counts.all([](int64_t x) { return x >= 0; }) ||
      !floors.all([](double x) { return x >= 0 && x <= 1; }))
    return nb::none();
  const Fresh token(Kind::i64, {count}), logprob(Kind::f32, {count}), raw(Kind::f32, {count}),
      entropy(Kind::f32, {count});
  const bool half = z.kind() == Kind::bf16;
  const Sample call{half ? nullptr : z.data<float>(),
                    key.data<int64_t>(),
                    temperatures.data(),
                    masses.data(),
                    counts.data(),
                    token.data<int64_t>(),
                    logprob.data<float>(),
                    raw.data<float>(),
                    entropy.data<float>(),
                    count,
                    z.size(1),
                    floors.data(),
                    half ? z.data<bf16>() : nullptr};
  int64_t failed;
  {
    const nb::gil_scoped_release release;
    failed = current().sample(call);
  }
  if (failed >= 0) return nb::none();
  return nb::make_tuple(token.object(), logprob.object(), raw.object(), entropy.object());
}

// Whether tensors can be read: `capsule` is torch.Tensor.__dlpack_c_exchange_api__.
bool open(handle capsule, handle tensor, handle parameter) {
  auto* table = static_cast<const DLExchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (table == nullptr) {
    PyErr_Clear();
    return false;
  }
  if (table->version.major != 1 || table->view == nullptr) return false;
  exchange = {table, tensor.ptr(), parameter.ptr()};
  return true;
}

// Every argument may be None: the long way raises the error if it must not be.
template <class... Args>
void define(nb::module_& m, const char* name, object (*op)(Args...)) {
  m.def(name, op, (static_cast<void>(sizeof(Args)), nb::arg().none())...);
}

}  // namespace

int64_t append(const Append& p) {
  for (int64_t t = 0; t < p.count; ++t)
    if (p.slots[t] < -1 || p.slots[t] >= p.num_slots) return t;
  for (int64_t t = 0; t < p.count; ++t) {
    if (p.slots[t] < 0 || p.row_size == 0) continue;  // k and v may be null if rows are empty
    std::memcpy(p.k_pages + p.slots[t] * p.row_size, p.k + t * p.k_stride, p.row_size);
    std::memcpy(p.v_pages + p.slots[t] * p.row_size, p.v + t * p.v_stride, p.row_size);
  }
  return -1;
}

void define_direct(nb::module_& m) {
  nb::module_ direct = m.def_submodule("direct");
  direct.def("open", open);
  define(direct, "append_kv", append_kv);
  define(direct, "rope_append", rope_append);
  define(direct, "tree_decode", tree_decode);
  define(direct, "rms_norm", rms_norm);
  define(direct, "add_rms_norm", add_rms_norm);
  define(direct, "rope", rope);
  define(direct, "silu_mul", silu_mul);
  define(direct, "sample", sample);
}

}  // namespace ibtpo
