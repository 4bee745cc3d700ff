// cuGetProcAddress: libraries ask for every function by name and by the CUDA version whose form they want. A function
// that is not here is not found, and cuda-bindings then names it in its error.
#include "driver.h"

typedef struct { const char *name; void *function; int since; } Entry;  // since: the first CUDA version of that form
#define E(function) {#function, (void *)function, 0}

// Names that cuda.h maps to _v2 and later forms are listed as they are asked for.
CUresult cuCtxGetDevice_v2(CUdevice *, CUcontext);
CUresult cuMemGetMemPool(CUmemoryPool *, CUmemLocation *, CUmemAllocationType);
CUresult cuStreamGetCtx_v2(CUstream, CUcontext *, CUgreenCtx *);
CUresult cuStreamGetCaptureInfo_v2(CUstream, CUstreamCaptureStatus *, cuuint64_t *, CUgraph *, const CUgraphNode **,
                                   size_t *);
CUresult cuStreamGetCaptureInfo_v3(CUstream, CUstreamCaptureStatus *, cuuint64_t *, CUgraph *, const CUgraphNode **,
                                   const CUgraphEdgeData **, size_t *);

// The newest form of a name first.
static const Entry ENTRIES[] = {
    // devices.c
    E(cuInit), E(cuDriverGetVersion), E(cuDeviceGetCount), E(cuDeviceGet), E(cuDeviceGetName), E(cuDeviceGetUuid),
    E(cuDeviceTotalMem), E(cuMemGetInfo), E(cuDeviceGetPCIBusId), E(cuDeviceGetAttribute), E(cuDeviceCanAccessPeer),
    E(cuDevicePrimaryCtxRetain), E(cuDevicePrimaryCtxRelease), E(cuDevicePrimaryCtxGetState), E(cuCtxGetCurrent),
    E(cuCtxSetCurrent), E(cuCtxPushCurrent), E(cuCtxPopCurrent),
    {"cuCtxGetDevice", (void *)cuCtxGetDevice_v2, 13000}, E(cuCtxGetDevice), E(cuCtxGetStreamPriorityRange),
    E(cuCtxSynchronize), E(cuGetErrorName), E(cuGetErrorString),
    // memory.c
    E(cuMemAllocAsync), E(cuMemAllocFromPoolAsync), E(cuMemFreeAsync), E(cuMemAlloc), E(cuMemFree), E(cuMemAllocHost),
    E(cuMemHostAlloc), E(cuMemFreeHost), E(cuPointerGetAttribute), E(cuPointerGetAttributes),
    E(cuDeviceGetDefaultMemPool), E(cuDeviceGetMemPool), E(cuMemGetMemPool),
    {"cuMemGetDefaultMemPool", (void *)cuMemGetMemPool, 0}, E(cuMemPoolGetAttribute), E(cuMemPoolSetAttribute),
    // copies.c
    E(cuMemcpyHtoDAsync), E(cuMemcpyDtoHAsync), E(cuMemcpyDtoDAsync), E(cuMemcpyAsync), E(cuMemcpyHtoD),
    E(cuMemcpyDtoH), E(cuMemsetD8Async), E(cuMemsetD16Async), E(cuMemsetD32Async),
    // streams.c
    E(cuStreamCreateWithPriority), E(cuStreamCreate), E(cuStreamDestroy), E(cuStreamSynchronize), E(cuStreamQuery),
    {"cuStreamGetCtx", (void *)cuStreamGetCtx_v2, 12050}, E(cuStreamGetCtx), E(cuStreamGetDevice),
    E(cuStreamGetFlags), E(cuStreamGetPriority), E(cuStreamGetId), E(cuEventCreate), E(cuEventDestroy),
    E(cuEventRecord), E(cuEventRecordWithFlags), E(cuEventSynchronize), E(cuEventQuery), E(cuLaunchHostFunc),
    // graphs.c
    E(cuStreamBeginCapture), E(cuStreamEndCapture), E(cuStreamWaitEvent), E(cuStreamIsCapturing),
    {"cuStreamGetCaptureInfo", (void *)cuStreamGetCaptureInfo_v3, 12030},
    {"cuStreamGetCaptureInfo", (void *)cuStreamGetCaptureInfo_v2, 11030}, E(cuThreadExchangeStreamCaptureMode),
    E(cuGraphInstantiateWithParams), E(cuGraphInstantiateWithFlags), E(cuGraphUpload), E(cuGraphLaunch),
    E(cuGraphExecDestroy), E(cuGraphDestroy), E(cuGraphGetNodes), E(cuUserObjectCreate), E(cuUserObjectRelease),
    E(cuGraphRetainUserObject), E(cuGraphReleaseUserObject),
    // modules.c
    E(cuLibraryLoadData), E(cuLibraryUnload), E(cuLibraryGetKernel), E(cuKernelGetFunction), E(cuKernelGetLibrary),
    E(cuModuleGetLoadingMode), E(cuFuncGetAttribute), E(cuKernelGetAttribute), E(cuFuncSetAttribute),
    E(cuKernelSetAttribute), E(cuKernelGetParamInfo), E(cuLaunchKernelEx), E(cuLaunchKernel),
    {"cuGetProcAddress", (void *)cuGetProcAddress, 0},
};

API cuGetProcAddress(const char *name, void **function, int version, cuuint64_t flags,
                     CUdriverProcAddressQueryResult *found) {
    (void)flags;
    for (size_t i = 0; i < sizeof ENTRIES / sizeof *ENTRIES; i++)
        if (!strcmp(ENTRIES[i].name, name) && version >= ENTRIES[i].since) {
            *function = ENTRIES[i].function;
            if (found) *found = CU_GET_PROC_ADDRESS_SUCCESS;
            return CUDA_SUCCESS;
        }
    *function = NULL;
    if (found) *found = CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return CUDA_ERROR_NOT_FOUND;
}
