/* A CUDA driver of one device whose memory is the host's and whose streams do everything at once: as much of libcuda as the real
   cuda-bindings, cuda-core and PyCUDA need to serve our engines. It refuses to capture graphs. What it does not know succeeds. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
typedef unsigned long long P;
static __thread void *stack[64];
static __thread int depth;
static long left = 1L << 26, streams, events, blocks, retained;

/* What was not given back: streams, events and blocks; how often the context is still retained. */
long stand_in_left(void) { return streams + events + blocks; }
long stand_in_retained(void) { return retained; }

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *v) { return *v = 13000, 0; }
int cuDeviceGetCount(int *n) { return *n = 1, 0; }
int cuDeviceGet(int *d, int n) { return *d = n, n == 0 ? 0 : 101; }
int cuDeviceGetName(char *s, int n, int d) { return strncpy(s, "Stand-in", n), 0; }
int cuDeviceTotalMem_v2(size_t *n, int d) { return *n = 1L << 26, 0; }
int cuDeviceGetAttribute(int *v, int a, int d) { return *v = a == 75 ? 9 : a == 76 ? 0 : 1, 0; }
int cuDevicePrimaryCtxRetain(void **c, int d) { return retained++, *c = (void *)7, 0; }
int cuDevicePrimaryCtxRelease_v2(int d) { return retained--, 0; }
int cuCtxPushCurrent_v2(void *c) { return stack[depth++] = c, 0; }
int cuCtxPopCurrent_v2(void **c) { return depth ? (*c = stack[--depth], 0) : 201; }
int cuCtxGetCurrent(void **c) { return *c = depth ? stack[depth - 1] : 0, 0; }
int cuCtxSetCurrent(void *c) { return depth ? (stack[depth - 1] = c, 0) : 201; }
int cuCtxGetDevice(int *d) { return *d = 0, depth ? 0 : 201; }
int cuMemGetInfo_v2(size_t *f, size_t *t) { return *f = left, *t = 1L << 26, depth ? 0 : 201; }
int cuStreamCreate(void **s, unsigned f) { return depth && f == 1 ? (streams++, *s = malloc(8), 0) : 1; }
int cuStreamDestroy_v2(void *s) { return streams--, free(s), 0; }
int cuStreamSynchronize(void *s) { return depth ? 0 : 201; }
int cuStreamBeginCapture_v2(void *s, int mode) { return mode == 1 ? 900 : 1; }
int cuStreamIsCapturing(void *s, int *v) { return *v = 0, 0; }
int cuStreamGetCtx(void *s, void **c) { return *c = (void *)7, 0; }
int cuStreamGetDevice(void *s, int *d) { return *d = 0, 0; }
int cuEventCreate(void **e, unsigned f) { return depth && f == 3 ? (events++, *e = malloc(8), 0) : 1; }
int cuEventDestroy_v2(void *e) { return events--, free(e), 0; }
int cuEventRecord(void *e, void *s) { return e && s ? 0 : 400; }
int cuEventSynchronize(void *e) { return e ? 0 : 400; }
int cuStreamWaitEvent(void *s, void *e, unsigned f) { return e && s && !f ? 0 : 400; }
int cuMemcpyHtoDAsync_v2(P d, const void *h, size_t n, void *s) { return memcpy((void *)d, h, n), 0; }
int cuMemcpyDtoHAsync_v2(void *h, P d, size_t n, void *s) { return memcpy(h, (void *)d, n), 0; }

static int take(void **p, size_t n) { /* the size lies before the block */
    char *block = aligned_alloc(512, (n + 1535) / 512 * 512);
    *(size_t *)block = n;
    return blocks++, *p = block + 512, 0;
}
int cuMemAlloc_v2(P *p, size_t n) { return !depth ? 201 : (long)n > left ? 2 : (left -= n, take((void **)p, n)); }
int cuMemFree_v2(P p) { return left += *(size_t *)(p - 512), blocks--, free((void *)(p - 512)), 0; }
int cuMemAllocFromPoolAsync(P *p, size_t n, void *pool, void *s) { return cuMemAlloc_v2(p, n); }
int cuMemFreeAsync(P p, void *s) { return cuMemFree_v2(p); }
int cuMemAllocHost_v2(void **p, size_t n) { return depth ? take(p, n) : 201; }
int cuMemHostAlloc(void **p, size_t n, unsigned f) { return depth ? take(p, n) : 201; }
int cuMemFreeHost(void *p) { return blocks--, free((char *)p - 512), 0; }
int cuMemPoolCreate(void **p, void *properties) { return *p = (void *)9, 0; }
int cuMemPoolGetAttribute(void *p, int a, void *v) { return *(P *)v = 0, 0; }
int cuGetErrorString(int e, const char **text) { return *text = "stand-in", 0; }
int cuGetErrorName(int e, const char **text) { return *text = e == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "STAND_IN", 0; }

static int unknown(void) { return 0; }
int cuGetProcAddress_v2(const char *name, void **found, int version, P flags, int *status) {
    char full[200];
    const char *ends[] = {"_v2", ""};
    if (status) *status = 0;
    *found = (void *)unknown;
    for (int i = 0; i < 2; i++) {
        snprintf(full, sizeof full, "%s%s", name, ends[i]);
        void *own = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD), *symbol = own ? dlsym(own, full) : 0;
        if (symbol) return *found = symbol, 0;
    }
    return 0;
}
