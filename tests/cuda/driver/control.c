// What a test sees and sets: the schedule, the problems, the counts, the callback that stands for kernels.
#include "driver.h"
#include <stdarg.h>
#include <stdio.h>

pthread_mutex_t driver_mutex = PTHREAD_MUTEX_INITIALIZER;
pthread_cond_t stream_idle = PTHREAD_COND_INITIALIZER;
enum Schedule schedule = LAZY;
unsigned seed = 1;
long statistics[STATISTICS];
KernelCallback on_kernel;
int problem_count;
static char *problems;
static size_t problem_bytes;

int driver_lock(void) {
    pthread_mutex_lock(&driver_mutex);
    start_devices();
    return 0;
}

void driver_unlock(const int *unused) {
    (void)unused;
    pthread_mutex_unlock(&driver_mutex);
}

void problem(const char *format, ...) {
    char text[1024];
    va_list values;
    va_start(values, format);
    vsnprintf(text, sizeof text, format, values);
    va_end(values);
    size_t size = strlen(text);
    problems = realloc(problems, problem_bytes + size + 2);
    memcpy(problems + problem_bytes, text, size);
    problem_bytes += size;
    problems[problem_bytes++] = '\n';
    problems[problem_bytes] = 0;
    problem_count++;
}

// One problem a line.
EXPORTED const char *standin_problems(void) { return problems ? problems : ""; }

EXPORTED void standin_clear_problems(void) {
    LOCKED;
    problem_bytes = 0;
    problem_count = 0;
    if (problems) problems[0] = 0;
}

// "lazy", "eager" or "random:SEED"
EXPORTED void standin_schedule(const char *how) {
    LOCKED;
    schedule = !strncmp(how, "random", 6) ? RANDOM : !strcmp(how, "eager") ? EAGER : LAZY;
    const char *colon = strchr(how, ':');
    if (colon) seed = (unsigned)atoi(colon + 1);
}

EXPORTED long standin_statistic(int which) { return statistics[which]; }

// What there is now and was not released.
EXPORTED long standin_living(int which) {
    LOCKED;
    if (which == GRAPHS) return living_graphs;
    if (which != STREAMS) return living_blocks(which == PINNED_BLOCKS ? PINNED_MEMORY : DEVICE_MEMORY,
                                               which == DEVICE_BYTES);
    long count = 0;
    for (Stream *stream = streams; stream; stream = stream->next) count += !stream->destroyed;
    return count;
}

EXPORTED void standin_on_kernel(KernelCallback callback) { on_kernel = callback; }

// For what stands in for an engine: its memory must be live when it runs. Returns how many problems that made.
EXPORTED int standin_check(const char *what, const void *address, size_t size, int device) {
    LOCKED;
    int before = problem_count;
    check_range(what, address, size, device, 1);
    return problem_count - before;
}

// How many streams are being recorded.
EXPORTED int standin_captures(void) {
    LOCKED;
    int count = 0;
    for (Stream *stream = streams; stream; stream = stream->next) count += stream->capture != NULL;
    return count;
}
