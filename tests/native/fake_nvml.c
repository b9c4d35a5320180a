/* A libnvidia-ml.so.1 whose cards are rows of a file.
 *
 * The file is mapped by every process that loads this library and by the test that drives it, so a value written by one
 * is seen by all at once.  The layout is mirrored in tests/tools/fake_nvml.py; change both.
 * The state file is named by fake_nvml_attach() or, when nobody called it, by FAKE_NVML_STATE.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7,
       LIBRARY_NOT_FOUND = 12, FUNCTION_NOT_FOUND = 13 };
enum { INIT, SHUTDOWN, COUNT, HANDLE, UUID, NAME, MEM, COMPUTE, GRAPHICS, PROCESS_NAME, MIG, FUNCTIONS = 16 };
enum { DEVICES = 8, PROCESSES = 8 };

struct function { int32_t error, after, times, delay_us, calls, unused; };
struct process { uint32_t pid, lists; uint64_t used; char name[48]; };
struct device {
    uint64_t total, reserved, used, peak, refused;
    int32_t mem_error, handle_error, parent, mig, processes, unused;
    char uuid[96], name[64], pci[32];
    struct process process[PROCESSES];
};
struct state {
    int32_t references, devices, old_driver, peak_references;
    struct function function[FUNCTIONS];
    struct device device[DEVICES];
};

static struct state *state;

int fake_nvml_attach(const char *path) {
    int file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0) return -1;
    void *at = mmap(NULL, sizeof(struct state), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (at == MAP_FAILED) return -1;
    /* The old mapping stays: a thread of an earlier driver may still be inside a call. */
    state = at;
    return (int)sizeof(struct state);
}

/* Allocate on a card for a process that is not the caller of NVML; 0 if it did not fit, and then nothing was taken. */
int fake_nvml_take(int index, uint64_t bytes) {
    struct device *d = &state->device[index];
    uint64_t before = __atomic_load_n(&d->used, __ATOMIC_SEQ_CST);
    do {
        if (before + d->reserved + bytes > d->total) {
            __atomic_add_fetch(&d->refused, 1, __ATOMIC_SEQ_CST);
            return 0;
        }
    } while (!__atomic_compare_exchange_n(&d->used, &before, before + bytes, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
    uint64_t now = before + bytes, seen = __atomic_load_n(&d->peak, __ATOMIC_SEQ_CST);
    while (seen < now && !__atomic_compare_exchange_n(&d->peak, &seen, now, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {}
    return 1;
}

void fake_nvml_give(int index, uint64_t bytes) {
    __atomic_sub_fetch(&state->device[index].used, bytes, __ATOMIC_SEQ_CST);
}

/* Count the call, wait as told, and give the error that is due, if any. */
static int enter(int which) {
    if (!state) {
        const char *path = getenv("FAKE_NVML_STATE");
        if (!path || fake_nvml_attach(path) < 0) return LIBRARY_NOT_FOUND;
    }
    struct function *f = &state->function[which];
    int call = __atomic_add_fetch(&f->calls, 1, __ATOMIC_SEQ_CST);
    if (f->delay_us > 0) usleep((useconds_t)f->delay_us);
    if (f->error && call > f->after && (f->times < 0 || call <= f->after + f->times)) return f->error;
    if (which != INIT && __atomic_load_n(&state->references, __ATOMIC_SEQ_CST) <= 0) return UNINITIALIZED;
    return OK;
}

#define ENTER(which) do { int due = enter(which); if (due) return due; } while (0)

static int text(char *to, unsigned size, const char *from) {
    if (strlen(from) + 1 > size) return INSUFFICIENT_SIZE;
    strcpy(to, from);
    return OK;
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    ENTER(INIT);
    int now = __atomic_add_fetch(&state->references, 1, __ATOMIC_SEQ_CST);
    if (now > state->peak_references) state->peak_references = now;
    return OK;
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlInit(void) { return nvmlInitWithFlags(0); }

int nvmlShutdown(void) {
    ENTER(SHUTDOWN);
    __atomic_sub_fetch(&state->references, 1, __ATOMIC_SEQ_CST);
    return OK;
}

const char *nvmlErrorString(int code) {
    switch (code) {
    case NOT_SUPPORTED: return "Not Supported";
    case 4: return "Insufficient Permissions";
    case 9: return "Driver Not Loaded";
    case 15: return "GPU is lost";
    case 18: return "Driver/library version mismatch";
    default: return "Unknown Error";
    }
}

int nvmlSystemGetDriverVersion(char *to, unsigned size) { return text(to, size, "570.86.16"); }
int nvmlSystemGetCudaDriverVersion_v2(int *to) {
    *to = 12080;
    return OK;
}

static int mig_child(int parent, unsigned index) {
    for (int i = 0; i < state->devices; i++)
        if (state->device[i].parent == parent && index-- == 0) return i;
    return -1;
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    ENTER(COUNT);
    *count = 0;
    for (int i = 0; i < state->devices; i++) *count += state->device[i].parent < 0;
    return OK;
}

static int hand_out(int index, struct device **to) {
    if (index < 0) return NOT_FOUND;
    if (state->device[index].handle_error) return state->device[index].handle_error;
    *to = &state->device[index];
    return OK;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, struct device **to) {
    ENTER(HANDLE);
    int found = mig_child(-1, index); /* whole cards are the children of nobody */
    return found < 0 ? INVALID_ARGUMENT : hand_out(found, to);
}

int nvmlDeviceGetHandleByUUID(const char *uuid, struct device **to) {
    ENTER(HANDLE);
    for (int i = 0; i < state->devices; i++)
        if (!strcmp(state->device[i].uuid, uuid)) return hand_out(i, to);
    return NOT_FOUND;
}

int nvmlDeviceGetHandleByPciBusId_v2(const char *pci, struct device **to) {
    ENTER(HANDLE);
    for (int i = 0; i < state->devices; i++)
        if (state->device[i].parent < 0 && !strcmp(state->device[i].pci, pci)) return hand_out(i, to);
    return NOT_FOUND;
}

int nvmlDeviceGetUUID(struct device *d, char *to, unsigned size) { ENTER(UUID); return text(to, size, d->uuid); }
int nvmlDeviceGetName(struct device *d, char *to, unsigned size) { ENTER(NAME); return text(to, size, d->name); }

struct memory { uint64_t total, free, used; };
int nvmlDeviceGetMemoryInfo(struct device *d, struct memory *to) {
    ENTER(MEM);
    if (d->mem_error) return d->mem_error;
    uint64_t used = __atomic_load_n(&d->used, __ATOMIC_SEQ_CST);
    to->total = d->total;
    to->used = used + d->reserved;
    to->free = d->total - d->reserved - used;
    return OK;
}

struct memory_v2 { unsigned version; uint64_t total, reserved, free, used; };
int nvmlDeviceGetMemoryInfo_v2(struct device *d, struct memory_v2 *to) {
    ENTER(MEM);
    if (state->old_driver) return FUNCTION_NOT_FOUND;
    if (d->mem_error) return d->mem_error;
    uint64_t used = __atomic_load_n(&d->used, __ATOMIC_SEQ_CST);
    to->total = d->total;
    to->reserved = d->reserved;
    to->used = used;
    to->free = d->total - d->reserved - used;
    return OK;
}

struct process_info { unsigned pid; uint64_t used; unsigned gpu_instance, compute_instance; };
static int list(struct device *d, unsigned which, unsigned *count, struct process_info *to) {
    if (state->old_driver) return FUNCTION_NOT_FOUND;
    unsigned room = to ? *count : 0, found = 0;
    for (int i = 0; i < d->processes; i++) {
        if (!(d->process[i].lists & which)) continue;
        if (found < room) to[found] = (struct process_info){d->process[i].pid, d->process[i].used, ~0u, ~0u};
        found++;
    }
    *count = found;
    return found > room ? INSUFFICIENT_SIZE : OK;
}
int nvmlDeviceGetComputeRunningProcesses_v3(struct device *d, unsigned *count, struct process_info *to) {
    ENTER(COMPUTE);
    return list(d, 1, count, to);
}
int nvmlDeviceGetGraphicsRunningProcesses_v3(struct device *d, unsigned *count, struct process_info *to) {
    ENTER(GRAPHICS);
    return list(d, 2, count, to);
}

int nvmlSystemGetProcessName(unsigned pid, char *to, unsigned size) {
    ENTER(PROCESS_NAME);
    for (int i = 0; i < state->devices; i++)
        for (int p = 0; p < state->device[i].processes; p++)
            if (state->device[i].process[p].pid == pid && state->device[i].process[p].name[0])
                return text(to, size, state->device[i].process[p].name);
    return NOT_FOUND;
}

int nvmlDeviceGetMigMode(struct device *d, unsigned *current, unsigned *pending) {
    ENTER(MIG);
    if (d->mig < 0) return NOT_SUPPORTED;
    *current = *pending = (unsigned)d->mig;
    return OK;
}
int nvmlDeviceGetMaxMigDeviceCount(struct device *d, unsigned *count) {
    (void)d;
    ENTER(MIG);
    *count = 7;
    return OK;
}
int nvmlDeviceGetMigDeviceHandleByIndex(struct device *d, unsigned index, struct device **to) {
    ENTER(MIG);
    return hand_out(mig_child((int)(d - state->device), index), to);
}
