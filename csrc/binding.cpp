// SPDX-License-Identifier: Apache-2.0
// The ops of silu_mul_quant.cu and group_quant.cu for torch, through the C functions of its stable ABI alone: one library
// works with every torch from 2.11 on, and with every Python.
//
// Each op has the schema of the Python op of its name. What it does not do itself (a form that has no kernel here, a GPU
// that the library has no code for, bad arguments) goes on to `vllm_fusion_plugin_triton::<op>`, with its arguments as they
// are. Loading the library defines `vllm_fusion_plugin_cuda::<op>`; `vfp_bind` makes any dispatch key of any op run it.
#include <array>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include <cuda_runtime_api.h>

#include "launch.h"
#include "torch_abi.h"

#define VFP_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr uint64_t kTorch = uint64_t{2} << 56 | uint64_t{11} << 48;  // of the ABI, not of the torch that is there
constexpr const char* kFile = "csrc/binding.cpp";  // for torch's messages
constexpr const char* kNamespace = "vllm_fusion_plugin_cuda";
constexpr const char* kFallback = "vllm_fusion_plugin_triton::";

// What Python has to say of an error, instead of "a call failed": see vfp_set_error.
thread_local std::string python_error;
thread_local bool is_value_error = false;

void check(AOTITorchError error, const char* what) {
  if (error) throw std::runtime_error(std::string("vllm-fusion-plugin: torch failed: ") + what);
}
#define CHECK_TORCH(call) check((call), #call)

void check_cuda(int error, const char* op) {
  if (error) {
    const auto* text = cudaGetErrorString(static_cast<cudaError_t>(error));
    throw std::runtime_error(std::string("vllm-fusion-plugin: ") + op + ": " + text);
  }
}

template <class T>
T as(StableIValue value) {
  T result;
  std::memcpy(&result, &value, sizeof(result));
  return result;
}

template <class T>
StableIValue as_value(T value) {
  StableIValue result = 0;
  std::memcpy(&result, &value, sizeof(value));
  return result;
}

class Tensor {
 public:
  explicit Tensor(AtenTensorHandle handle = nullptr) : handle_(handle) {}
  Tensor(Tensor&& other) noexcept : handle_(other.release()) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  AtenTensorHandle get() const { return handle_; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }
  void* data() const {
    void* pointer = nullptr;
    CHECK_TORCH(aoti_torch_get_data_ptr(handle_, &pointer));
    return pointer;
  }

 private:
  AtenTensorHandle handle_;
};

std::string_view text_of(StableIValue value) {
  const auto handle = as<StringHandle>(value);
  const char* data = nullptr;
  size_t length = 0;
  CHECK_TORCH(torch_string_c_str(handle, &data));
  CHECK_TORCH(torch_string_length(handle, &length));
  return {data, length};
}

// ---- devices ---------------------------------------------------------------------------------------------------------

struct Device {
  bool known = false;
  bool has_code = false;  // for its kernels in this library
  bool pdl = false;
};

constexpr int kDevices = 64;
std::array<Device, kDevices> devices;  // written once each, with the same values by whoever comes first

// Makes `index` the current device as long as it lives.
class Current {
 public:
  explicit Current(int index) {
    check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
    changed_ = before_ != index;
    if (changed_) check_cuda(cudaSetDevice(index), "cudaSetDevice");
  }
  ~Current() {
    if (changed_) cudaSetDevice(before_);
  }

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Of the current device; loads all kernels when it is first asked.
const Device& device_of(int index) {
  Device& device = devices[index];
  if (!device.known) {
    Device found;
    int major = 0;
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index), "cudaDeviceGetAttribute");
    found.pdl = major >= 9;
    const int error = vfp::load_silu_mul_group_fp8_quant();
    found.has_code = !error && !vfp::load_group_fp8_quant();
    if (!found.has_code) cudaGetLastError();  // it is told, not left for whoever asks next
    found.known = true;
    device = found;
  }
  return device;
}

bool pdl_is_on() {
  const char* value = std::getenv("FUSION_PLUGIN_PDL");  // kernels/pdl.py
  return value == nullptr || std::strcmp(value, "0") != 0;
}

// ---- arguments -------------------------------------------------------------------------------------------------------

struct Input {
  void* data;
  int32_t device;
  int32_t dtype;
  int64_t rows, columns, row_stride;
  bool fp16;
};

// x, if it is what kernels take. 16-byte loads: rows have to start at multiples of 8 numbers.
bool read_input(AtenTensorHandle x, Input& input) {
  int32_t type = 0;
  int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
  CHECK_TORCH(aoti_torch_get_device_type(x, &type));
  CHECK_TORCH(aoti_torch_get_dim(x, &dim));
  if (type != aoti_torch_device_type_cuda() || dim != 2) return false;
  CHECK_TORCH(aoti_torch_get_dtype(x, &input.dtype));
  input.fp16 = input.dtype == aoti_torch_dtype_float16();
  if (!input.fp16 && input.dtype != aoti_torch_dtype_bfloat16()) return false;
  CHECK_TORCH(aoti_torch_get_sizes(x, &sizes));
  CHECK_TORCH(aoti_torch_get_strides(x, &strides));
  CHECK_TORCH(aoti_torch_get_data_ptr(x, &input.data));
  CHECK_TORCH(aoti_torch_get_device_index(x, &input.device));
  input.rows = sizes[0];
  input.columns = sizes[1];
  input.row_stride = input.rows > 1 ? strides[0] : 0;
  return strides[1] == 1 && input.columns > 0 && reinterpret_cast<uintptr_t>(input.data) % 16 == 0 &&
         input.row_stride % 8 == 0 && input.device >= 0 && input.device < kDevices;
}

// How ops/quant.py says that groups are quantised.
struct How {
  int64_t group_size;
  std::string_view layout;
  bool ue8m0;
  std::string_view rounding;
  std::string_view fp8;
};

constexpr std::string_view kOrFlashinfer = "_or_flashinfer";
constexpr int64_t kFlashinferRows = 32;

// False where a kernel here does not do it, or nobody does.
bool read_rounding(const How& how, int64_t rows, bool fp16, vfp::Rounding& rounding) {
  std::string_view name = how.rounding;
  bool flashinfer = name == "flashinfer";
  if (name.size() > kOrFlashinfer.size() && name.substr(name.size() - kOrFlashinfer.size()) == kOrFlashinfer) {
    if (fp16 || how.layout == "packed") return false;
    name.remove_suffix(kOrFlashinfer.size());
    flashinfer = rows < kFlashinferRows;
  }
  if (name == "custom_op") {
    rounding = vfp::Rounding::custom_op;
  } else if (name == "reciprocal") {
    rounding = vfp::Rounding::reciprocal;
  } else if (name != "flashinfer") {
    return false;
  }
  if (flashinfer) {
    rounding = vfp::Rounding::flashinfer;
    return !fp16 && how.layout != "packed";  // not packed, because never powers of two
  }
  if (how.ue8m0) rounding = vfp::Rounding::power;
  return true;
}

bool read_how(const How& how, const Input& input, int64_t width, vfp::GroupQuant& quant) {
  constexpr int64_t kMost = int64_t{1} << 30;  // of an int, with room for a tile
  if (input.rows > kMost || input.columns > kMost) return false;
  const bool sizes = (how.group_size == 128 || how.group_size == 64) && width > 0 && width % how.group_size == 0;
  if (!sizes || how.fp8 != "e4m3fn" || !read_rounding(how, input.rows, input.fp16, quant.rounding)) return false;
  const int64_t groups = width / how.group_size;
  vfp::Scales& scales = quant.scales;
  scales = {nullptr, 1, input.rows, input.rows, false};
  if (how.layout == "row") {
    scales.row_stride = groups;
    scales.group_stride = 1;
  } else if (how.layout == "tma" || how.layout == "packed") {
    scales.group_stride = scales.rows = (input.rows + 3) / 4 * 4;
    scales.packed = how.layout == "packed";
    // Not packed scales of three groups in an int32: the fourth byte has to be zeroed.
    if (scales.packed && (!how.ue8m0 || how.group_size != 128 || groups % 4 != 0)) return false;
  } else if (how.layout != "column") {
    return false;
  }
  quant.x = input.data;
  quant.x_stride = input.row_stride;
  quant.rows = input.rows;
  quant.width = width;
  quant.group_size = static_cast<int>(how.group_size);
  quant.fp16 = input.fp16;
  return true;
}

// ---- outputs ---------------------------------------------------------------------------------------------------------

Tensor empty(int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride, int32_t dtype, int32_t device) {
  const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
  AtenTensorHandle handle = nullptr;
  CHECK_TORCH(aoti_torch_empty_strided(2, sizes, strides, dtype, aoti_torch_device_type_cuda(), device, &handle));
  return Tensor(handle);
}

// As `GroupScales.empty` in ops/quant.py: the padding of a column belongs to the storage, the last one's too.
Tensor empty_scales(const vfp::GroupQuant& quant, int32_t device) {
  const vfp::Scales& scales = quant.scales;
  const int32_t dtype = scales.packed ? aoti_torch_dtype_int32() : aoti_torch_dtype_float32();
  const int64_t columns = quant.width / quant.group_size / (scales.packed ? 4 : 1);
  if (scales.rows == quant.rows) {
    return empty(quant.rows, columns, scales.row_stride, scales.group_stride, dtype, device);
  }
  const Tensor storage = empty(columns, scales.rows, scales.rows, 1, dtype, device);
  const int64_t sizes[] = {quant.rows, columns}, strides[] = {scales.row_stride, scales.group_stride};
  AtenTensorHandle handle = nullptr;
  CHECK_TORCH(aoti_torch__reinterpret_tensor(storage.get(), 2, sizes, strides, 0, &handle));
  return Tensor(handle);
}

// ---- calls -----------------------------------------------------------------------------------------------------------

void fall_back(const char* op, StableIValue* stack) {
  python_error.clear();
  if (torch_call_dispatcher((std::string(kFallback) + op).c_str(), "", stack, kTorch)) {
    if (python_error.empty()) throw std::runtime_error(std::string("vllm-fusion-plugin: ") + op + " failed");
    const std::string text = std::exchange(python_error, {});
    if (is_value_error) throw std::invalid_argument(text);  // which Python gets as a ValueError
    throw std::runtime_error(text);
  }
}

vfp::Tile forced;  // by vfp_force_tile, while warps are not 0

const vfp::Tile* tile() { return forced.warps ? &forced : nullptr; }

void delete_strings(StableIValue* stack, std::initializer_list<int> positions) {
  for (const int position : positions) torch_delete_string(as<StringHandle>(stack[position]));
}

// (Tensor x, int group_size, str scale_layout, bool use_ue8m0, str act_rounding, str quant_rounding, bool keep_act,
// str fp8) -> Tensor[]
void silu_mul_group_fp8_quant(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* kName = "silu_mul_group_fp8_quant";
  const auto x = as<AtenTensorHandle>(stack[0]);
  const How how{as<int64_t>(stack[1]), text_of(stack[2]), as<bool>(stack[3]), text_of(stack[5]), text_of(stack[7])};
  const std::string_view act_rounding = text_of(stack[4]);
  const bool keep_act = as<bool>(stack[6]);
  const vfp::Act act_kind = act_rounding == "native" ? vfp::Act::native
                            : act_rounding == "eager" ? vfp::Act::eager
                                                      : vfp::Act::custom_op;
  Input input;
  vfp::GroupQuant quant;
  const bool known = act_kind != vfp::Act::custom_op || act_rounding == "custom_op";
  if (!known || !read_input(x, input) || input.columns % 2 || !read_how(how, input, input.columns / 2, quant)) {
    return fall_back(kName, stack);
  }
  const Current current(input.device);
  const Device& device = device_of(input.device);
  if (!device.has_code) return fall_back(kName, stack);

  Tensor codes = empty(quant.rows, quant.width, quant.width, 1, aoti_torch_dtype_float8_e4m3fn(), input.device);
  Tensor scales = empty_scales(quant, input.device);
  Tensor act;
  if (keep_act) act = empty(quant.rows, quant.width, quant.width, 1, input.dtype, input.device);
  if (quant.rows > 0) {
    quant.codes = static_cast<uint8_t*>(codes.data());
    quant.scales.data = scales.data();
    vfp::Where where{input.device, nullptr, device.pdl && pdl_is_on()};
    CHECK_TORCH(aoti_torch_get_current_cuda_stream(input.device, &where.stream));
    check_cuda(vfp::silu_mul_group_fp8_quant(quant, act_kind, keep_act ? act.data() : nullptr, where, tile()), kName);
  }

  StableListHandle outputs = nullptr;
  CHECK_TORCH(torch_new_list_reserve_size(keep_act ? 3 : 2, &outputs));
  CHECK_TORCH(torch_list_push_back(outputs, as_value(codes.release())));
  CHECK_TORCH(torch_list_push_back(outputs, as_value(scales.release())));
  if (keep_act) CHECK_TORCH(torch_list_push_back(outputs, as_value(act.release())));
  delete_strings(stack, {2, 4, 5, 7});
  aoti_torch_delete_tensor_object(x);
  stack[0] = as_value(outputs);
}

// (Tensor x, int group_size, str scale_layout, bool use_ue8m0, str quant_rounding, str fp8) -> (Tensor, Tensor)
void group_fp8_quant(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* kName = "group_fp8_quant";
  const auto x = as<AtenTensorHandle>(stack[0]);
  const How how{as<int64_t>(stack[1]), text_of(stack[2]), as<bool>(stack[3]), text_of(stack[4]), text_of(stack[5])};
  Input input;
  vfp::GroupQuant quant;
  if (!read_input(x, input) || !read_how(how, input, input.columns, quant)) return fall_back(kName, stack);
  const Current current(input.device);
  const Device& device = device_of(input.device);
  if (!device.has_code) return fall_back(kName, stack);

  Tensor codes = empty(quant.rows, quant.width, quant.width, 1, aoti_torch_dtype_float8_e4m3fn(), input.device);
  Tensor scales = empty_scales(quant, input.device);
  if (quant.rows > 0) {
    quant.codes = static_cast<uint8_t*>(codes.data());
    quant.scales.data = scales.data();
    vfp::Where where{input.device, nullptr, device.pdl && pdl_is_on()};
    CHECK_TORCH(aoti_torch_get_current_cuda_stream(input.device, &where.stream));
    check_cuda(vfp::group_fp8_quant(quant, where, tile()), kName);
  }
  delete_strings(stack, {2, 4, 5});
  aoti_torch_delete_tensor_object(x);
  stack[0] = as_value(codes.release());
  stack[1] = as_value(scales.release());
}

using Boxed = void (*)(StableIValue*, uint64_t, uint64_t);

struct Op {
  const char* name;
  const char* schema;
  Boxed run;
};

constexpr Op kOps[] = {
    {"silu_mul_group_fp8_quant",
     "silu_mul_group_fp8_quant(Tensor x, int group_size, str scale_layout, bool use_ue8m0, str act_rounding, "
     "str quant_rounding, bool keep_act=False, str fp8=\"e4m3fn\") -> Tensor[]",
     silu_mul_group_fp8_quant},
    {"group_fp8_quant",
     "group_fp8_quant(Tensor x, int group_size, str scale_layout, bool use_ue8m0, str quant_rounding, "
     "str fp8=\"e4m3fn\") -> (Tensor, Tensor)",
     group_fp8_quant},
};

TorchLibraryHandle define() {
  TorchLibraryHandle library = nullptr;
  CHECK_TORCH(aoti_torch_library_init_def(kNamespace, kFile, __LINE__, &library));
  for (const Op& op : kOps) CHECK_TORCH(aoti_torch_library_def(library, op.schema));
  return library;
}

TorchLibraryHandle implement(const char* ns, const char* key, const Op& op) {
  TorchLibraryHandle library = nullptr;
  CHECK_TORCH(aoti_torch_library_init_impl(ns, key, kFile, __LINE__, &library));
  CHECK_TORCH(torch_library_impl(library, op.name, op.run, kTorch));
  return library;
}

}  // namespace

// Define the ops and let CUDA tensors run them. Once, before all else here. 0, or -1: torch does not take them.
VFP_EXPORT int vfp_define() try {
  static TorchLibraryHandle library = define();  // held for the life of the process
  static const bool done = [] {
    for (const Op& op : kOps) implement(kNamespace, "CUDA", op);
    return true;
  }();
  return library && done ? 0 : -1;
} catch (const std::exception&) {
  return -1;
}

// The names of the ops, one after another until null.
VFP_EXPORT const char* vfp_op(int number) {
  return number >= 0 && number < static_cast<int>(std::size(kOps)) ? kOps[number].name : nullptr;
}

// Let dispatch key `key` of ns::name run the op of that name here. Null on failure; else for vfp_unbind.
VFP_EXPORT void* vfp_bind(const char* ns, const char* key, const char* name) try {
  for (const Op& op : kOps) {
    if (std::strcmp(op.name, name) == 0) return implement(ns, key, op);
  }
  return nullptr;
} catch (const std::exception&) {
  return nullptr;
}

VFP_EXPORT void vfp_unbind(void* binding) {
  if (binding) aoti_torch_delete_library_object(static_cast<TorchLibraryHandle>(binding));
}

// Of a GPU: 0 if the library has code for it, else a cudaError_t. Loads all kernels.
VFP_EXPORT int vfp_has_code(int index) try {
  if (index < 0 || index >= kDevices) return cudaErrorInvalidDevice;
  const Current current(index);
  return device_of(index).has_code ? cudaSuccess : cudaErrorNoKernelImageForDevice;
} catch (const std::exception&) {
  return cudaErrorUnknown;
}

// What the exception is to say when the op that is being fallen back to fails: torch's stable ABI passes no message on.
VFP_EXPORT void vfp_set_error(const char* text, int value_error) {
  python_error = text;
  is_value_error = value_error != 0;
}

// Tile of all launches from now on; 0 warps: chosen by shape. For tuning.
VFP_EXPORT void vfp_force_tile(int rows, int groups, int warps) { forced = {rows, groups, warps}; }
