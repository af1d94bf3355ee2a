// The CUDA runtime and cuBLAS of a GPU that is not there, preloaded below an unchanged torch.
//
// Memory is address space: it has addresses, sizes and a limit, and is never touched. Kernels and matrix products are not run.
// Numbers that the host sends come back to it as they were, all others as zeros.
//
// Declared by hand, after CUDA 13: the headers in torch's wheels are incomplete. tests/shared/rehearsal/test_stubs.py compares
// what torch reads with what is written here.
//
// Environment: BATON_STUB_MEMORY bytes of the GPU, BATON_STUB_LIMIT bytes that can be allocated, BATON_STUB_CAPABILITY 90 for
// 9.0, BATON_STUB_PROCESSORS streaming multiprocessors, BATON_STUB_NAME.
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>

#define API extern "C" __attribute__((visibility("default")))

namespace {

using Error = int;
constexpr Error SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2;
constexpr int VERSION = 13000;
constexpr size_t FROM_HOST = size_t{1} << 24;  // larger copies from the host are not made: weights, not rows of tokens
constexpr int SHARED_MEMORY = 49152, SHARED_MEMORY_OPT_IN = 232448, SHARED_MEMORY_OF_PROCESSOR = 233472;
constexpr int THREADS = 1024, THREADS_OF_PROCESSOR = 2048, BLOCKS_OF_PROCESSOR = 32, WARP = 32, REGISTERS = 65536;

struct Properties {  // cudaDeviceProp
  char name[256];
  char uuid[16];
  char luid[8];
  unsigned luidDeviceNodeMask;
  size_t totalGlobalMem, sharedMemPerBlock;
  int regsPerBlock, warpSize;
  size_t memPitch;
  int maxThreadsPerBlock, maxThreadsDim[3], maxGridSize[3];
  size_t totalConstMem;
  int major, minor;
  size_t textureAlignment, texturePitchAlignment;
  int multiProcessorCount, integrated, canMapHostMemory;
  int textures[39];  // maxTexture1D to maxSurfaceCubemapLayered
  size_t surfaceAlignment;
  int concurrentKernels, ECCEnabled, pciBusID, pciDeviceID, pciDomainID, tccDriver, asyncEngineCount, unifiedAddressing;
  int memoryBusWidth, l2CacheSize, persistingL2CacheMaxSize, maxThreadsPerMultiProcessor;
  int streamPrioritiesSupported, globalL1CacheSupported, localL1CacheSupported;
  size_t sharedMemPerMultiprocessor;
  int regsPerMultiprocessor, managedMemory, isMultiGpuBoard, multiGpuBoardGroupID, hostNativeAtomicSupported;
  int pageableMemoryAccess, concurrentManagedAccess, computePreemptionSupported, canUseHostPointerForRegisteredMem;
  int cooperativeLaunch;
  size_t sharedMemPerBlockOptin;
  int pageableMemoryAccessUsesHostPageTables, directManagedMemAccessFromHost, maxBlocksPerMultiProcessor;
  int accessPolicyMaxWindowSize;
  size_t reservedSharedMemPerBlock;
  int rest[76];  // hostRegisterSupported to reserved
};

struct PointerAttributes {  // cudaPointerAttributes
  int type, device;
  void *devicePointer, *hostPointer;
  long reserved[8];
};
enum { UNREGISTERED = 0, HOST = 1, DEVICE = 2 };

struct FunctionAttributes {  // cudaFuncAttributes
  size_t sharedSizeBytes, constSizeBytes, localSizeBytes;
  int maxThreadsPerBlock, numRegs, ptxVersion, binaryVersion, cacheModeCA, maxDynamicSharedSizeBytes;
  int preferredShmemCarveout, clusterDimMustBeSet, requiredClusterWidth, requiredClusterHeight, requiredClusterDepth;
  int clusterSchedulingPolicyPreference, nonPortableClusterSizeAllowed, reserved[16];
};

struct Dim3 {
  unsigned x, y, z;
};

size_t number(const char* name, size_t otherwise) {
  const char* text = getenv(name);
  return text ? strtoull(text, nullptr, 10) : otherwise;
}
size_t memory() {
  static const size_t value = number("BATON_STUB_MEMORY", size_t{80} << 30);
  return value;
}
// Read each time: a rank is played in a fork, which sets its own.
size_t limit() { return number("BATON_STUB_LIMIT", memory()); }
int capability() { return static_cast<int>(number("BATON_STUB_CAPABILITY", 90)); }
int processors() {
  static const int value = static_cast<int>(number("BATON_STUB_PROCESSORS", 132));
  return value;
}

std::mutex guard;
std::map<char*, size_t> device_blocks, host_blocks, sent;  // sent: copies from the host, by where they are
size_t used = 0;
thread_local Error last_error = SUCCESS;

char* reserve(size_t size) {
  void* found = mmap(nullptr, size ? size : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return found == MAP_FAILED ? nullptr : static_cast<char*>(found);
}

bool within(const std::map<char*, size_t>& blocks, const void* address) {
  char* at = static_cast<char*>(const_cast<void*>(address));
  auto found = blocks.upper_bound(at);
  if (found == blocks.begin()) return false;
  --found;
  return at < found->first + found->second;
}

Error allocate(void** address, size_t size) {
  std::lock_guard<std::mutex> locked(guard);
  char* found = used + size > limit() ? nullptr : reserve(size);
  *address = found;
  if (!found) return last_error = OUT_OF_MEMORY;
  device_blocks[found] = size;
  used += size;
  return SUCCESS;
}

// Forget what the host sent to these bytes. With the lock.
void overwritten(char* begin, size_t size) {
  auto first = sent.upper_bound(begin);
  if (first != sent.begin() && std::prev(first)->first + std::prev(first)->second > begin) --first;
  while (first != sent.end() && first->first < begin + size) first = sent.erase(first);
}

Error release(std::map<char*, size_t>& blocks, void* address, size_t* counter) {
  if (!address) return SUCCESS;
  std::lock_guard<std::mutex> locked(guard);
  auto found = blocks.find(static_cast<char*>(address));
  if (found == blocks.end()) return last_error = INVALID_VALUE;
  munmap(found->first, found->second ? found->second : 1);
  if (counter) {  // the GPU's
    overwritten(found->first, found->second);
    *counter -= found->second;
  }
  blocks.erase(found);
  return SUCCESS;
}

Error allocate_on_host(void** address, size_t size) {
  char* found = reserve(size);
  if (!found) return last_error = OUT_OF_MEMORY;
  std::lock_guard<std::mutex> locked(guard);
  host_blocks[found] = size;
  *address = found;
  return SUCCESS;
}

// What the host has sent to the GPU comes back as it was. Anything else there is the result of a kernel, which did not run: zeros.
Error copy(void* to, const void* from, size_t size) {
  if (!size) return SUCCESS;
  std::lock_guard<std::mutex> locked(guard);
  char *target = static_cast<char*>(to), *source = static_cast<char*>(const_cast<void*>(from));
  bool to_device = within(device_blocks, to), from_device = within(device_blocks, from);
  auto found = sent.find(source);
  bool known = from_device ? found != sent.end() && found->second == size : size <= FROM_HOST;
  if (to_device) overwritten(target, size);
  if (known) {
    memmove(to, from, size);
    if (to_device) sent[target] = size;
  } else if (!to_device) {
    from_device ? memset(to, 0, size) : memmove(to, from, size);
  }
  return SUCCESS;
}

Error fill(void* at, size_t size) {
  std::lock_guard<std::mutex> locked(guard);
  overwritten(static_cast<char*>(at), size);
  return SUCCESS;
}

void* token() {  // a stream, event or handle: never followed
  static uintptr_t last = 0x1000;
  std::lock_guard<std::mutex> locked(guard);
  return reinterpret_cast<void*>(last += 16);
}
template <typename T>
Error give_token(T* where) {
  *where = reinterpret_cast<T>(token());
  return SUCCESS;
}
template <typename T, typename V>
Error give(T* where, V value) {
  if (where) *where = value;
  return SUCCESS;
}

int driver_nothing() { return 0; }
int driver_context_state(int, unsigned* flags, int* active) {
  give(flags, 0u);
  return give(active, 1);
}

}  // namespace

// The device
API Error cudaGetDeviceCount(int* count) { return give(count, 1); }
API Error cudaGetDevice(int* device) { return give(device, 0); }
API Error cudaSetDevice(int) { return SUCCESS; }
API Error cudaDriverGetVersion(int* version) { return give(version, VERSION); }
API Error cudaRuntimeGetVersion(int* version) { return give(version, VERSION); }
API const char* cudaGetErrorString(Error error) { return error == OUT_OF_MEMORY ? "out of memory" : "error of the stubs"; }
API const char* cudaGetErrorName(Error error) { return error == OUT_OF_MEMORY ? "cudaErrorMemoryAllocation" : "cudaError"; }
API Error cudaGetLastError() {
  Error error = last_error;
  last_error = SUCCESS;
  return error;
}
API Error cudaPeekAtLastError() { return last_error; }
API Error cudaGetDeviceProperties(Properties* p, int) {
  memset(p, 0, sizeof *p);
  const char* name = getenv("BATON_STUB_NAME");
  strncpy(p->name, name ? name : "stub", sizeof p->name - 1);
  p->totalGlobalMem = memory();
  p->sharedMemPerBlock = SHARED_MEMORY;
  p->sharedMemPerBlockOptin = SHARED_MEMORY_OPT_IN;
  p->sharedMemPerMultiprocessor = SHARED_MEMORY_OF_PROCESSOR;
  p->regsPerBlock = p->regsPerMultiprocessor = REGISTERS;
  p->warpSize = WARP;
  p->maxThreadsPerBlock = THREADS;
  p->maxThreadsPerMultiProcessor = THREADS_OF_PROCESSOR;
  p->maxBlocksPerMultiProcessor = BLOCKS_OF_PROCESSOR;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = THREADS;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = INT32_MAX;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->totalConstMem = 65536;
  p->major = capability() / 10;
  p->minor = capability() % 10;
  p->textureAlignment = 512;
  p->multiProcessorCount = processors();
  p->l2CacheSize = 50 << 20;
  p->memoryBusWidth = 5120;
  p->unifiedAddressing = p->concurrentKernels = p->cooperativeLaunch = p->canMapHostMemory = 1;
  p->asyncEngineCount = 3;
  return SUCCESS;
}
API Error cudaDeviceGetAttribute(int* value, int attribute, int) {
  switch (attribute) {  // cudaDeviceAttr
    case 1: return give(value, THREADS);  // MaxThreadsPerBlock
    case 5: return give(value, INT32_MAX);  // MaxGridDimX
    case 6: case 7: return give(value, 65535);  // MaxGridDimY, MaxGridDimZ
    case 8: return give(value, SHARED_MEMORY);  // MaxSharedMemoryPerBlock
    case 10: return give(value, WARP);  // WarpSize
    case 16: return give(value, processors());  // MultiProcessorCount
    case 39: return give(value, THREADS_OF_PROCESSOR);  // MaxThreadsPerMultiProcessor
    case 75: return give(value, capability() / 10);  // ComputeCapabilityMajor
    case 76: return give(value, capability() % 10);  // ComputeCapabilityMinor
    case 81: return give(value, SHARED_MEMORY_OF_PROCESSOR);  // MaxSharedMemoryPerMultiprocessor
    case 97: return give(value, SHARED_MEMORY_OPT_IN);  // MaxSharedMemoryPerBlockOptin
    case 106: return give(value, BLOCKS_OF_PROCESSOR);  // MaxBlocksPerMultiprocessor
    default: return give(value, 1);
  }
}
API Error cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  give(least, 0);
  return give(greatest, -5);
}
API Error cudaDeviceCanAccessPeer(int* can, int, int) { return give(can, 0); }

// Memory
API Error cudaMalloc(void** address, size_t size) { return allocate(address, size); }
API Error cudaFree(void* address) { return release(device_blocks, address, &used); }
API Error cudaMemGetInfo(size_t* free, size_t* total) {
  std::lock_guard<std::mutex> locked(guard);
  give(free, limit() > used ? limit() - used : 0);
  return give(total, memory());
}
API Error cudaHostAlloc(void** address, size_t size, unsigned) { return allocate_on_host(address, size); }
API Error cudaFreeHost(void* address) { return release(host_blocks, address, nullptr); }
API Error cudaPointerGetAttributes(PointerAttributes* attributes, const void* address) {
  std::lock_guard<std::mutex> locked(guard);
  memset(attributes, 0, sizeof *attributes);
  void* at = const_cast<void*>(address);
  attributes->type = within(device_blocks, at) ? DEVICE : within(host_blocks, at) ? HOST : UNREGISTERED;
  attributes->devicePointer = attributes->type == UNREGISTERED ? nullptr : at;
  attributes->hostPointer = attributes->type == HOST ? at : nullptr;
  return SUCCESS;
}
API Error cudaGetSymbolAddress(void** address, const void*) { return allocate(address, 4096); }
API Error cudaMemcpy(void* to, const void* from, size_t size, int) { return copy(to, from, size); }
API Error cudaMemcpyAsync(void* to, const void* from, size_t size, int, void*) { return copy(to, from, size); }
API Error cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size, void*) { return copy(to, from, size); }
API Error cudaMemset(void* at, int, size_t size) { return fill(at, size); }
API Error cudaMemsetAsync(void* at, int, size_t size, void*) { return fill(at, size); }

// Streams and events: all work is done at once
API Error cudaStreamCreate(void** stream) { return give_token(stream); }
API Error cudaStreamCreateWithFlags(void** stream, unsigned) { return give_token(stream); }
API Error cudaStreamCreateWithPriority(void** stream, unsigned, int) { return give_token(stream); }
API Error cudaStreamGetPriority(void*, int* priority) { return give(priority, 0); }
API Error cudaStreamIsCapturing(void*, int* status) { return give(status, 0); }
API Error cudaStreamGetCaptureInfo(void*, int* status, unsigned long long* id, void** graph, void*, void*, size_t* number) {
  give(status, 0);
  give(id, 0ull);
  give(graph, nullptr);
  return give(number, size_t{0});
}
API Error cudaEventCreate(void** event) { return give_token(event); }
API Error cudaEventCreateWithFlags(void** event, unsigned) { return give_token(event); }
API Error cudaEventElapsedTime(float* milliseconds, void*, void*) { return give(milliseconds, 0.001f); }

// Kernels
API void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
API unsigned __cudaPushCallConfiguration(Dim3, Dim3, size_t, void*) { return 1; }  // not zero: the kernel is not called
API Error __cudaGetKernel(const void** kernel, const void* function) { return give(kernel, function); }
API Error cudaFuncGetAttributes(FunctionAttributes* attributes, const void*) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = THREADS;
  attributes->numRegs = 32;
  attributes->binaryVersion = attributes->ptxVersion = capability();
  attributes->maxDynamicSharedSizeBytes = SHARED_MEMORY;
  return SUCCESS;
}
API Error cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  return give(blocks, 2);
}
API Error cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long, int* result) {
  bool state = !strcmp(name, "cuDevicePrimaryCtxGetState");
  *function = state ? reinterpret_cast<void*>(driver_context_state) : reinterpret_cast<void*>(driver_nothing);
  return give(result, 0);
}

// cuBLAS and cuBLASLt
struct Heuristic {  // cublasLtMatmulHeuristicResult_t
  uint64_t algorithm[8];
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};
API int cublasCreate_v2(void** handle) { return give_token(handle); }
API int cublasGetMathMode(void*, int* mode) { return give(mode, 0); }
API int cublasGetPointerMode_v2(void*, int* mode) { return give(mode, 0); }
API size_t cublasLtGetVersion() { return 130101; }
API int cublasLtMatmulDescCreate(void** description, int, int) { return give_token(description); }
API int cublasLtMatmulPreferenceCreate(void** preference) { return give_token(preference); }
API int cublasLtMatrixLayoutCreate(void** layout, int, uint64_t, uint64_t, int64_t) { return give_token(layout); }
API int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, Heuristic* found, int* number) {
  memset(found, 0, sizeof *found);
  return give(number, 1);
}
