// What libtorch_cuda offers to C++ alone, as C functions: streams, events, graphs, the allocator, device facts.
//
// Built as a shared object that the engine opens at run time, after libtorch_cuda itself, so that the same engine starts
// where there is no CUDA. Every function returns 0, or 1 after an exception whose first line lora_cuda_error gives.
// Handles are made and freed here; the Rust side is src/cuda.rs and nothing else includes this.

#include <ATen/cuda/CUDAGraph.h>
#include <ATen/cuda/jiterator.h>
#include <ATen/Context.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cstdint>
#include <cstring>
#include <exception>
#include <string>

namespace {

thread_local std::string last_error;

template <typename F>
int guarded(F body) {
  try {
    body();
    return 0;
  } catch (const c10::Error& error) {
    last_error = error.what_without_backtrace();
  } catch (const std::exception& error) {
    last_error = error.what();
  } catch (...) {
    last_error = "unknown exception";
  }
  return 1;
}

// The two numbers of a byte as one word of two 16-bit floats, the first one low, where memory has it first.
//
// libtorch compiles this for the device that is there, when it is first used. A thread chooses among the quantiles by
// selections: of a table every thread of a warp would want another entry. The product of 32 bits is rounded once.
const std::string unpack_nf4 = R"(
__device__ __forceinline__ float nf4_quantile(unsigned code) {
  return code & 8 ? (code & 4 ? (code & 2 ? (code & 1 ? 1.0f : 0.72295684f) : (code & 1 ? 0.562617f : 0.44070983f))
                              : (code & 2 ? (code & 1 ? 0.33791524f : 0.2461123f) : (code & 1 ? 0.1609302f : 0.0795803f)))
                  : (code & 4 ? (code & 2 ? (code & 1 ? 0.0f : -0.091050036f) : (code & 1 ? -0.18477343f : -0.28444138f))
                              : (code & 2 ? (code & 1 ? -0.3949175f : -0.5250731f) : (code & 1 ? -0.6961928f : -1.0f)));
}

__device__ __forceinline__ unsigned nf4_round_bf16(float number) {
  const unsigned bits = __float_as_uint(number);
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

__device__ __forceinline__ unsigned nf4_round_fp16(float number) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(number));
  return bits;
}

template <typename T> __device__ T nf4_bf16(T byte, T factor) {
  const float scale = __int_as_float(factor);
  return nf4_round_bf16(nf4_quantile(byte >> 4) * scale) | nf4_round_bf16(nf4_quantile(byte & 15) * scale) << 16;
}

template <typename T> __device__ T nf4_fp16(T byte, T factor) {
  const float scale = __int_as_float(factor);
  return nf4_round_fp16(nf4_quantile(byte >> 4) * scale) | nf4_round_fp16(nf4_quantile(byte & 15) * scale) << 16;
}
)";

}  // namespace

extern "C" {

// Grows with every change of a signature below; the Rust side refuses another number.
int lora_cuda_interface() { return 2; }

const char* lora_cuda_error() { return last_error.c_str(); }

int lora_cuda_device_count(int32_t* count) {
  return guarded([&] { *count = c10::cuda::device_count(); });
}

// name: at least 256 bytes; numbers: compute capability major, minor, multiprocessors, total memory.
int lora_cuda_device(int32_t device, char* name, int64_t* numbers) {
  return guarded([&] {
    cudaDeviceProp properties;
    C10_CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
    std::strncpy(name, properties.name, 255);
    name[255] = 0;
    numbers[0] = properties.major;
    numbers[1] = properties.minor;
    numbers[2] = properties.multiProcessorCount;
    numbers[3] = static_cast<int64_t>(properties.totalGlobalMem);
  });
}

// Free and total bytes of the device, then of the caching allocator: allocated, its peak, reserved, its peak.
int lora_cuda_memory(int32_t device, int64_t* numbers) {
  return guarded([&] {
    c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
    size_t free = 0;
    size_t total = 0;
    C10_CUDA_CHECK(cudaMemGetInfo(&free, &total));
    const auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(static_cast<c10::DeviceIndex>(device));
    const auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    numbers[0] = static_cast<int64_t>(free);
    numbers[1] = static_cast<int64_t>(total);
    numbers[2] = stats.allocated_bytes[all].current;
    numbers[3] = stats.allocated_bytes[all].peak;
    numbers[4] = stats.reserved_bytes[all].current;
    numbers[5] = stats.reserved_bytes[all].peak;
  });
}

int lora_cuda_reset_peak(int32_t device) {
  return guarded([&] { c10::cuda::CUDACachingAllocator::resetPeakStats(static_cast<c10::DeviceIndex>(device)); });
}

int lora_cuda_empty_cache() {
  return guarded([] { c10::cuda::CUDACachingAllocator::emptyCache(); });
}

int lora_cuda_synchronize() {
  return guarded([] { c10::cuda::device_synchronize(); });
}

// Makes a stream of the pool the current one of this thread: the default stream cannot be captured.
int lora_cuda_enter_side_stream(int32_t device) {
  return guarded([&] {
    c10::cuda::set_device(static_cast<c10::DeviceIndex>(device));
    c10::cuda::setCurrentCUDAStream(c10::cuda::getStreamFromPool(false, static_cast<c10::DeviceIndex>(device)));
  });
}

// Bits: 1 flash, 2 memory-efficient, 4 cuDNN, 8 the plain formula.
int lora_cuda_attention_kernels(int32_t allowed) {
  return guarded([&] {
    auto& context = at::globalContext();
    context.setSDPUseFlash((allowed & 1) != 0);
    context.setSDPUseMemEfficient((allowed & 2) != 0);
    context.setSDPUseCuDNN((allowed & 4) != 0);
    context.setSDPUseMath((allowed & 8) != 0);
  });
}

int lora_cuda_allow_tf32(int32_t allowed) {
  return guarded([&] {
    at::globalContext().setAllowTF32CuBLAS(allowed != 0);
    at::globalContext().setAllowTF32CuDNN(allowed != 0);
  });
}

// at::cuda::CUDAEvent needs headers of cuBLAS; the runtime's own events do not.
int lora_cuda_event_new(void** event) {
  return guarded([&] {
    cudaEvent_t created = nullptr;
    C10_CUDA_CHECK(cudaEventCreate(&created));
    *event = created;
  });
}

int lora_cuda_event_record(void* event) {
  return guarded([&] {
    C10_CUDA_CHECK(cudaEventRecord(static_cast<cudaEvent_t>(event), c10::cuda::getCurrentCUDAStream()));
  });
}

int lora_cuda_event_synchronize(void* event) {
  return guarded([&] { C10_CUDA_CHECK(cudaEventSynchronize(static_cast<cudaEvent_t>(event))); });
}

int lora_cuda_event_elapsed(void* start, void* end, float* milliseconds) {
  return guarded([&] {
    C10_CUDA_CHECK(
        cudaEventElapsedTime(milliseconds, static_cast<cudaEvent_t>(start), static_cast<cudaEvent_t>(end)));
  });
}

void lora_cuda_event_free(void* event) {
  guarded([&] { C10_CUDA_CHECK(cudaEventDestroy(static_cast<cudaEvent_t>(event))); });
}

int lora_cuda_pool_new(uint64_t* pool) {
  return guarded([&] {
    const auto id = at::cuda::graph_pool_handle();
    pool[0] = id.first;
    pool[1] = id.second;
  });
}

int lora_cuda_graph_new(void** graph) {
  return guarded([&] { *graph = new at::cuda::CUDAGraph(true); });
}

// Thread-local capture: a copy that another thread starts meanwhile does not break it. The backward pass runs on
// autograd's thread, on the captured stream, which is part of the capture whatever the mode.
int lora_cuda_graph_begin(void* graph, const uint64_t* pool) {
  return guarded([&] {
    static_cast<at::cuda::CUDAGraph*>(graph)->capture_begin({pool[0], pool[1]}, cudaStreamCaptureModeThreadLocal);
  });
}

int lora_cuda_graph_end(void* graph) {
  return guarded([&] { static_cast<at::cuda::CUDAGraph*>(graph)->capture_end(); });
}

int lora_cuda_graph_instantiate(void* graph, int64_t* nodes) {
  return guarded([&] {
    auto* captured = static_cast<at::cuda::CUDAGraph*>(graph);
    size_t count = 0;
    C10_CUDA_CHECK(cudaGraphGetNodes(captured->raw_cuda_graph(), nullptr, &count));
    *nodes = static_cast<int64_t>(count);
    captured->instantiate();
  });
}

int lora_cuda_graph_replay(void* graph) {
  return guarded([&] { static_cast<at::cuda::CUDAGraph*>(graph)->replay(); });
}

// packed: at::Tensor [blocks, bytes], uint8; factors: at::Tensor [blocks, 1], 32-bit; matrix: a new at::Tensor
// [blocks, 2 * bytes], fp16 if half is not 0, else bf16.
int lora_cuda_unpack_nf4(const void* packed, const void* factors, int32_t half, void** matrix) {
  return guarded([&] {
    const auto& bytes = *static_cast<const at::Tensor*>(packed);
    const auto scales = static_cast<const at::Tensor*>(factors)->view(at::kInt);
    const c10::cuda::CUDAGuard guard(bytes.device());
    // libtorch finds a compiled kernel by its text, not by the name of its function: each has a text of its own.
    const std::string name = half != 0 ? "nf4_fp16" : "nf4_bf16";
    const auto words =
        at::cuda::CompileAndLaunchKernel("// " + name + unpack_nf4, name, 1, {bytes, scales}, {}, false);
    *matrix = new at::Tensor(words[0].view(half != 0 ? at::kHalf : at::kBFloat16));
  });
}

void lora_cuda_graph_free(void* graph) {
  guarded([&] { delete static_cast<at::cuda::CUDAGraph*>(graph); });
}

}  // extern "C"
