// Tensors through DLPack's C exchange API (DLPack 1.3; `torch.Tensor.__dlpack_c_exchange_api__`): a table of functions
// that a producer of tensors offers to C, at a tenth of a microsecond a tensor.
//
// Source: the DLPack specification, whose binary layout the structs below follow.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <new>

namespace ibtpo {

struct DLVersion {
  uint32_t major, minor;
};

struct DLArray {
  void* data;
  int32_t device_type, device_id;
  int32_t num_dims;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct DLManaged {
  DLVersion version;
  void* context;
  void (*deleter)(DLManaged*);
  uint64_t flags;
  DLArray array;
};

struct DLExchange {
  DLVersion version;
  DLExchange* previous;
  int (*allocate)(DLArray*, DLManaged**, void*, void (*)(void*, const char*, const char*));
  int (*share)(void* object, DLManaged**);
  int (*wrap)(DLManaged*, void** object);
  int (*view)(void* object, DLArray*);  // may be null
  int (*current_stream)(int32_t, int32_t, void**);
};

// Bits of an element, and what they mean, as one number.
enum class Kind : int { other = 0, i32 = 0x020, i64 = 0x040, f32 = 0x220, f64 = 0x240, bf16 = 0x410 };

constexpr int64_t element_size(Kind kind) { return (static_cast<int>(kind) & 0xff) / 8; }

// The table of torch.Tensor, and the types that it serves; subclasses may give data another meaning.
struct Exchange {
  const DLExchange* table = nullptr;
  PyObject *tensor = nullptr, *parameter = nullptr;
};
inline Exchange exchange;

// A view of a tensor on the CPU; any other object has kind `other`.
class View {
 public:
  explicit View(nanobind::handle object) {
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
    if (type != exchange.tensor && type != exchange.parameter) return;
    if (exchange.table->view(object.ptr(), &array_) != 0) {  // no storage: a functorch wrapper, a sparse tensor
      PyErr_Clear();
      return;
    }
    if (array_.data == nullptr && count() != 0) return;  // traced: shapes without memory
    constexpr int kCPU = 1;
    if (array_.device_type == kCPU && array_.lanes == 1) kind_ = static_cast<Kind>(array_.code << 8 | array_.bits);
  }

  Kind kind() const { return kind_; }
  int64_t size(int dim) const { return array_.shape[dim]; }
  int64_t stride(int dim) const { return array_.strides[dim]; }
  const int64_t* shape() const { return array_.shape; }
  int num_dims() const { return array_.num_dims; }

  int64_t count() const {
    int64_t product = 1;
    for (int i = 0; i < array_.num_dims; ++i) product *= array_.shape[i];
    return product;
  }

  // Whether this has that kind and shape; -1 stands for any size.
  bool is(Kind kind, std::initializer_list<int64_t> shape) const {
    if (kind_ != kind || kind == Kind::other || array_.num_dims != static_cast<int>(shape.size())) return false;
    const int64_t* at = array_.shape;
    for (const int64_t size : shape)
      if (*at++ != size && size != -1) return false;
    return true;
  }

  // Whether the last `dims` dimensions are dense.
  bool dense(int dims) const {
    int64_t stride = 1;
    for (int i = array_.num_dims - 1; i >= array_.num_dims - dims; --i) {
      if (array_.shape[i] != 1 && array_.strides[i] != stride) return false;
      stride *= array_.shape[i];
    }
    return true;
  }
  bool dense() const { return dense(array_.num_dims); }

  template <class T>
  T* data() const {
    return reinterpret_cast<T*>(static_cast<char*>(array_.data) + array_.byte_offset);
  }

 private:
  DLArray array_{};
  Kind kind_ = Kind::other;
};

constexpr int kMaxDims = 8;

// A new tensor, dense and not initialised: one block of memory with its description in front.
class Fresh {
 public:
  Fresh(Kind kind, const int64_t* shape, int num_dims) {
    constexpr size_t kHead = (sizeof(Block) + 63) / 64 * 64;
    const int bits = static_cast<int>(kind) & 0xff;
    size_t count = 1;
    for (int i = 0; i < num_dims; ++i) count *= shape[i];
    auto* block = static_cast<Block*>(std::aligned_alloc(64, kHead + (count * element_size(kind) + 63) / 64 * 64));
    if (block == nullptr) throw std::bad_alloc();
    data_ = reinterpret_cast<char*>(block) + kHead;
    for (int64_t i = num_dims - 1, stride = 1; i >= 0; --i) {
      block->shape[i] = shape[i];
      block->strides[i] = stride;
      stride *= shape[i];
    }
    block->managed = {{1, 0},
                      nullptr,
                      [](DLManaged* managed) { std::free(managed); },
                      0,
                      {data_, 1, 0, num_dims, static_cast<uint8_t>(static_cast<int>(kind) >> 8),
                       static_cast<uint8_t>(bits), 1, block->shape, block->strides, 0}};
    void* object = nullptr;
    if (exchange.table->wrap(&block->managed, &object) != 0) {
      std::free(block);
      throw nanobind::python_error();
    }
    object_ = nanobind::steal(static_cast<PyObject*>(object));
  }
  Fresh(Kind kind, std::initializer_list<int64_t> shape) : Fresh(kind, shape.begin(), static_cast<int>(shape.size())) {}

  template <class T>
  T* data() const {
    return reinterpret_cast<T*>(data_);
  }
  const nanobind::object& object() const { return object_; }

 private:
  struct Block {
    DLManaged managed;
    int64_t shape[kMaxDims], strides[kMaxDims];
  };
  char* data_;
  nanobind::object object_;
};

inline Fresh like(const View& x) { return Fresh(x.kind(), x.shape(), x.num_dims()); }

}  // namespace ibtpo
