// Two equal devices and their primary contexts. A context is current in a thread, not in the process
// ("Context Management").
#include "driver.h"
#include <stdio.h>

#define DEPTH 16

Context contexts[DEVICES];
_Thread_local Context *current;
static _Thread_local Context *below[DEPTH];
static _Thread_local int depth;
int architecture = 89;
static const size_t GIB = (size_t)1 << 30;

void start_devices(void) {
    if (contexts[0].legacy.context) return;
    for (int i = 0; i < DEVICES; i++) {
        contexts[i].device = i;
        contexts[i].legacy = (Stream){.context = &contexts[i], .id = 1};
        contexts[i].per_thread = (Stream){.context = &contexts[i], .id = 2};
    }
    const char *text = getenv("STANDIN_ARCHITECTURE");
    if (text) architecture = atoi(text);
}

API cuInit(unsigned flags) {
    LOCKED;
    return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

API cuDriverGetVersion(int *version) {
    *version = 13000;
    return CUDA_SUCCESS;
}

API cuDeviceGetCount(int *count) {
    *count = DEVICES;
    return CUDA_SUCCESS;
}

API cuDeviceGet(CUdevice *device, int ordinal) {
    if (ordinal < 0 || ordinal >= DEVICES) return CUDA_ERROR_INVALID_DEVICE;
    *device = ordinal;
    return CUDA_SUCCESS;
}

API cuDeviceGetName(char *name, int size, CUdevice device) {
    snprintf(name, (size_t)size, "Stand-in %d sm_%d", device, architecture);
    return CUDA_SUCCESS;
}

API cuDeviceGetUuid(CUuuid *uuid, CUdevice device) {
    memset(uuid, 0, sizeof *uuid);
    uuid->bytes[0] = (char)device;
    return CUDA_SUCCESS;
}

API cuDeviceTotalMem(size_t *bytes, CUdevice device) {
    (void)device;
    *bytes = 24 * GIB;
    return CUDA_SUCCESS;
}

API cuMemGetInfo(size_t *left, size_t *total) {
    *left = 20 * GIB;
    *total = 24 * GIB;
    return CUDA_SUCCESS;
}

API cuDeviceGetPCIBusId(char *text, int size, CUdevice device) {
    snprintf(text, (size_t)size, "0000:%02x:00.0", device + 1);
    return CUDA_SUCCESS;
}

// Numbers of an RTX 4090. Attributes that are not listed are 0: not supported.
static const struct { CUdevice_attribute attribute; int value; } ATTRIBUTES[] = {
    {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK, 1024},
    {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X, 1024},
    {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y, 1024},
    {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z, 64},
    {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X, 2147483647},
    {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y, 65535},
    {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z, 65535},
    {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK, 49152},
    {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, 101376},
    {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, 102400},
    {CU_DEVICE_ATTRIBUTE_WARP_SIZE, 32},
    {CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 128},
    {CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK, 65536},
    {CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR, 65536},
    {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR, 1536},
    {CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT, 2},
    {CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED, 1},
    {CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING, 1},
    {CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS, 1},
    {CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY, 1},
    {CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY, 1},
};

API cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    LOCKED;
    if (device < 0 || device >= DEVICES) return CUDA_ERROR_INVALID_DEVICE;
    *value = 0;
    if (attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) *value = architecture / 10;
    if (attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR) *value = architecture % 10;
    for (size_t i = 0; i < sizeof ATTRIBUTES / sizeof *ATTRIBUTES; i++)
        if (ATTRIBUTES[i].attribute == attribute) *value = ATTRIBUTES[i].value;
    return CUDA_SUCCESS;
}

API cuDeviceCanAccessPeer(int *able, CUdevice device, CUdevice peer) {
    (void)device, (void)peer;
    *able = 0;
    return CUDA_SUCCESS;
}

API cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    LOCKED;
    if (device < 0 || device >= DEVICES) return CUDA_ERROR_INVALID_DEVICE;
    contexts[device].retained++;
    *context = &contexts[device];
    return CUDA_SUCCESS;
}

API cuDevicePrimaryCtxRelease(CUdevice device) {
    LOCKED;
    contexts[device].retained--;
    return CUDA_SUCCESS;
}

API cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    *flags = 0;
    *active = contexts[device].retained > 0;
    return CUDA_SUCCESS;
}

API cuCtxGetCurrent(CUcontext *context) {
    *context = current;
    return CUDA_SUCCESS;
}

API cuCtxSetCurrent(CUcontext context) {
    current = context;
    return CUDA_SUCCESS;
}

API cuCtxPushCurrent(CUcontext context) {
    if (depth == DEPTH) return CUDA_ERROR_INVALID_VALUE;
    below[depth++] = current;
    current = context;
    return CUDA_SUCCESS;
}

API cuCtxPopCurrent(CUcontext *context) {
    if (!current) return CUDA_ERROR_INVALID_CONTEXT;
    if (context) *context = current;
    current = depth ? below[--depth] : NULL;
    return CUDA_SUCCESS;
}

API cuCtxGetDevice(CUdevice *device) {
    if (!current) return CUDA_ERROR_INVALID_CONTEXT;
    *device = current->device;
    return CUDA_SUCCESS;
}

API cuCtxGetDevice_v2(CUdevice *device, CUcontext context) {  // CUDA 13: of this context, NULL for the current one
    if (!context && !current) return CUDA_ERROR_INVALID_CONTEXT;
    *device = (context ? context : current)->device;
    return CUDA_SUCCESS;
}

API cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    if (!current) return CUDA_ERROR_INVALID_CONTEXT;
    *least = 0;
    *greatest = -5;
    return CUDA_SUCCESS;
}

// "Waits for the current context's tasks", and for no other context's.
API cuCtxSynchronize(void) {
    LOCKED;
    if (!current) return CUDA_ERROR_INVALID_CONTEXT;
    statistics[SYNCHRONISATIONS]++;
    for (Stream *stream = streams; stream; stream = stream->next)
        if (stream->capture && stream->context == current) return refuse_on_captured(stream, "cuCtxSynchronize");
    drain_context(current);
    return CUDA_SUCCESS;
}

API cuGetErrorName(CUresult error, const char **name) {
    static _Thread_local char text[40];
    snprintf(text, sizeof text, "CUDA_ERROR_%d", error);
    *name = text;
    return CUDA_SUCCESS;
}

API cuGetErrorString(CUresult error, const char **message) {
    static _Thread_local char text[40];
    snprintf(text, sizeof text, "the stand-in driver's error %d", error);
    *message = text;
    return CUDA_SUCCESS;
}
