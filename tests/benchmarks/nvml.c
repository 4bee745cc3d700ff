/* A libnvidia-ml.so.1 with one GPU, for the real nvidia-ml-py: what NVML_REASONS says about its clocks (nvml.h). */
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 3 };
typedef struct { unsigned long long total, free, used; } Memory;

static int samples;

static unsigned long long reasons(void) { return strtoull(getenv("NVML_REASONS"), NULL, 0); }

int nvmlInitWithFlags(unsigned flags) { (void)flags; return SUCCESS; }
int nvmlInit_v2(void) { return SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) { return code == NOT_SUPPORTED ? "Not Supported" : "Unknown Error"; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = &samples; return index ? 2 : SUCCESS; }
int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts) {
    (void)device;
    *milliwatts = 300000 + 1000 * (samples++ % 3);
    return SUCCESS;
}
int nvmlDeviceGetClockInfo(void *device, unsigned kind, unsigned *mhz) {
    (void)device;
    *mhz = kind == 1 ? 1755 : 2619; /* NVML_CLOCK_SM, NVML_CLOCK_MEM */
    return SUCCESS;
}
int nvmlDeviceGetTemperature(void *device, unsigned sensor, unsigned *celsius) {
    (void)device, (void)sensor, (void)celsius;
    return NOT_SUPPORTED;
}
int nvmlDeviceGetMemoryInfo(void *device, Memory *memory) {
    (void)device;
    memset(memory, 0, sizeof *memory);
    memory->used = 5ull << 30;
    return SUCCESS;
}
int nvmlDeviceGetCurrentClocksEventReasons(void *device, unsigned long long *found) {
    (void)device;
    *found = reasons();
    return SUCCESS;
}
