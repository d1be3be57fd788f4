/* A CUDA driver for machines without a GPU: what kvikio calls, on memory of the host.
 *
 * Memory from stub_alloc is what CUDA calls device memory, so kvikio takes its way for devices:
 * bounce buffers and copies. Nothing runs asynchronously. It proves nothing about GDS, streams or
 * speed. Not thread-safe in stub_alloc and stub_free, which the tests call on one thread.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int CUresult;
enum { SUCCESS = 0, INVALID_VALUE = 1, MEMORY_DEVICE = 2, MAX_REGIONS = 1024 };
enum { ATTRIBUTE_CONTEXT = 1, ATTRIBUTE_MEMORY_TYPE = 2, ATTRIBUTE_DEVICE_POINTER = 3,
       ATTRIBUTE_DEVICE_ORDINAL = 9 };

static struct { uintptr_t base; size_t size; } regions[MAX_REGIONS];
static int dummy;
static unsigned long long copied_bytes;

void *stub_alloc(size_t size)
{
    void *base = NULL;
    for (int i = 0; i < MAX_REGIONS; i++)
        if (!regions[i].base && !posix_memalign(&base, 65536, size)) {
            regions[i].base = (uintptr_t)base;
            regions[i].size = size;
            return base;
        }
    return NULL;
}

void stub_free(void *base)
{
    for (int i = 0; i < MAX_REGIONS; i++)
        if (regions[i].base == (uintptr_t)base) {
            regions[i].base = 0;
            free(base);
        }
}

/* How much went to or from device memory. */
unsigned long long stub_copied_bytes(void) { return __atomic_load_n(&copied_bytes, __ATOMIC_SEQ_CST); }

static int region_of(uintptr_t address)
{
    for (int i = 0; i < MAX_REGIONS; i++)
        if (regions[i].base && address - regions[i].base < regions[i].size)
            return i;
    return -1;
}

static CUresult copy(uintptr_t target, uintptr_t source, size_t size)
{
    memcpy((void *)target, (void *)source, size);
    __atomic_fetch_add(&copied_bytes, size, __ATOMIC_SEQ_CST);
    return SUCCESS;
}

static CUresult give(void **out) { *out = &dummy; return SUCCESS; }

CUresult cuInit(unsigned flags) { return SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = 12000; return SUCCESS; }
CUresult cuDeviceGetCount(int *count) { *count = 1; return SUCCESS; }
CUresult cuDeviceGet(int *device, int ordinal) { *device = ordinal; return SUCCESS; }
CUresult cuDeviceGetName(char *name, int length, int device)
{
    strncpy(name, "stub", length);
    return SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 0; return SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(void **context, int device) { return give(context); }
CUresult cuDevicePrimaryCtxRelease_v2(int device) { return SUCCESS; }
CUresult cuCtxCreate_v2(void **context, unsigned flags, int device) { return give(context); }
CUresult cuCtxCreate_v4(void **context, void *params, unsigned flags, int device) { return give(context); }
CUresult cuCtxDestroy_v2(void *context) { return SUCCESS; }
CUresult cuCtxGetCurrent(void **context) { return give(context); }
CUresult cuCtxGetDevice(int *device) { *device = 0; return SUCCESS; }
CUresult cuCtxPopCurrent_v2(void **context) { return give(context); }
CUresult cuCtxPushCurrent_v2(void *context) { return SUCCESS; }
CUresult cuEventCreate(void **event, unsigned flags) { return give(event); }
CUresult cuEventDestroy_v2(void *event) { return SUCCESS; }
CUresult cuEventQuery(void *event) { return SUCCESS; }
CUresult cuEventRecord(void *event, void *stream) { return SUCCESS; }
CUresult cuEventSynchronize(void *event) { return SUCCESS; }
CUresult cuStreamCreate(void **stream, unsigned flags) { return give(stream); }
CUresult cuStreamDestroy_v2(void *stream) { return SUCCESS; }
CUresult cuStreamSynchronize(void *stream) { return SUCCESS; }
CUresult cuGetErrorName(CUresult error, const char **text) { *text = "STUB_ERROR"; return SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "stub error"; return SUCCESS; }
CUresult cuLaunchHostFunc(void *stream, void (*function)(void *), void *data)
{
    function(data);
    return SUCCESS;
}
CUresult cuMemHostAlloc(void **out, size_t size, unsigned flags)
{
    return posix_memalign(out, 4096, size) ? INVALID_VALUE : SUCCESS;
}
CUresult cuMemFreeHost(void *memory) { free(memory); return SUCCESS; }
CUresult cuMemHostRegister_v2(void *memory, size_t size, unsigned flags) { return SUCCESS; }
CUresult cuMemHostUnregister(void *memory) { return SUCCESS; }
CUresult cuMemcpyAsync(uintptr_t target, uintptr_t source, size_t size, void *stream)
{
    return copy(target, source, size);
}
CUresult cuMemcpyDtoHAsync_v2(void *target, uintptr_t source, size_t size, void *stream)
{
    return copy((uintptr_t)target, source, size);
}
CUresult cuMemcpyHtoDAsync_v2(uintptr_t target, const void *source, size_t size, void *stream)
{
    return copy(target, (uintptr_t)source, size);
}
CUresult cuMemGetAddressRange_v2(uintptr_t *base, size_t *size, uintptr_t address)
{
    int i = region_of(address);
    if (i < 0)
        return INVALID_VALUE;
    *base = regions[i].base;
    *size = regions[i].size;
    return SUCCESS;
}
CUresult cuPointerGetAttribute(void *value, int attribute, uintptr_t address)
{
    if (region_of(address) < 0)
        return INVALID_VALUE;
    switch (attribute) {
    case ATTRIBUTE_CONTEXT: *(void **)value = &dummy; return SUCCESS;
    case ATTRIBUTE_MEMORY_TYPE: *(unsigned *)value = MEMORY_DEVICE; return SUCCESS;
    case ATTRIBUTE_DEVICE_POINTER: *(uintptr_t *)value = address; return SUCCESS;
    case ATTRIBUTE_DEVICE_ORDINAL: *(int *)value = 0; return SUCCESS;
    }
    return INVALID_VALUE;
}
CUresult cuPointerGetAttributes(unsigned count, int *attributes, void **values, uintptr_t address)
{
    for (unsigned i = 0; i < count; i++)
        if (attributes[i] == ATTRIBUTE_MEMORY_TYPE)
            *(unsigned *)values[i] = region_of(address) < 0 ? 0 : MEMORY_DEVICE;
        else
            cuPointerGetAttribute(values[i], attributes[i], address);
    return SUCCESS;
}
