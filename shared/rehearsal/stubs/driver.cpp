// The part of the CUDA driver (libcuda.so.1) that torch and its libraries load by name. Everything else answers 0.
#define API extern "C" __attribute__((visibility("default")))

API int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  if (flags) *flags = 0;
  if (active) *active = 1;
  return 0;
}
