// Preloaded before libgomp under ThreadSanitizer: libgomp is not instrumented, so the sanitizer must be informed that
// what came before a parallel region happens before it, and the region before what comes after.
#include <dlfcn.h>

extern "C" {
void __tsan_acquire(void*);
void __tsan_release(void*);

struct Region {
  void (*body)(void*);
  void* data;
  char begin, end;
};

static void run(void* p) {
  auto* region = static_cast<Region*>(p);
  __tsan_acquire(&region->begin);
  region->body(region->data);
  __tsan_release(&region->end);
}

__attribute__((no_sanitize("thread"))) void GOMP_parallel(void (*body)(void*), void* data, unsigned threads,
                                                          unsigned flags) {
  using Function = void (*)(void (*)(void*), void*, unsigned, unsigned);
  static auto real = reinterpret_cast<Function>(dlsym(RTLD_NEXT, "GOMP_parallel"));
  Region region{body, data, 0, 0};
  __tsan_release(&region.begin);
  real(run, &region, threads, flags);
  __tsan_acquire(&region.end);
}
}
