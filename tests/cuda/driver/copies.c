// Copies and fills ("Memory Management", "API synchronization behavior").
#include "driver.h"

// A copy whose host side is pageable is not asynchronous, however it is called: nothing of ours may do that.
static CUresult copy(void *to, const void *from, size_t size, CUstream handle, int wait, const char *what) {
    LOCKED;
    Stream *stream = stream_of(handle);
    if (!stream) return CUDA_ERROR_INVALID_CONTEXT;
    if (stream->destroyed) return CUDA_ERROR_INVALID_HANDLE;
    int pageable = !block_at(from) || !block_at(to);
    if (pageable && !wait) problem("%s: pageable host memory, the copy is not asynchronous", what);
    statistics[COPIES]++;
    push(stream, (Operation){.kind = COPY, .to = to, .from = from, .size = size});
    if ((wait || pageable) && !stream->capture) drain(stream);
    return CUDA_SUCCESS;
}

API cuMemcpyHtoDAsync(CUdeviceptr to, const void *from, size_t size, CUstream stream) {
    return copy((void *)to, from, size, stream, 0, "cuMemcpyHtoDAsync");
}

API cuMemcpyDtoHAsync(void *to, CUdeviceptr from, size_t size, CUstream stream) {
    return copy(to, (void *)from, size, stream, 0, "cuMemcpyDtoHAsync");
}

API cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) {
    return copy((void *)to, (void *)from, size, stream, 0, "cuMemcpyDtoDAsync");
}

API cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) {
    return copy((void *)to, (void *)from, size, stream, 0, "cuMemcpyAsync");
}

API cuMemcpyHtoD(CUdeviceptr to, const void *from, size_t size) {
    return copy((void *)to, from, size, NULL, 1, "cuMemcpyHtoD");
}

API cuMemcpyDtoH(void *to, CUdeviceptr from, size_t size) {
    return copy(to, (void *)from, size, NULL, 1, "cuMemcpyDtoH");
}

static CUresult fill(CUdeviceptr to, unsigned value, int unit, size_t count, CUstream handle) {
    LOCKED;
    Stream *stream = stream_of(handle);
    if (!stream) return CUDA_ERROR_INVALID_CONTEXT;
    push(stream, (Operation){.kind = FILL, .to = (char *)to, .value = (int)value, .unit = unit, .size = count});
    return CUDA_SUCCESS;
}

API cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t count, CUstream stream) {
    return fill(to, value, 1, count, stream);
}

API cuMemsetD16Async(CUdeviceptr to, unsigned short value, size_t count, CUstream stream) {
    return fill(to, value, 2, count, stream);
}

API cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t count, CUstream stream) {
    return fill(to, value, 4, count, stream);
}
