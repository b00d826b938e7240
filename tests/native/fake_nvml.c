/* A small libnvidia-ml.so.1 for tests: the functions that the real pynvml calls for a topology, answered from the
 * text file that FAKE_NVML_CONFIG names. tests/native/build.py writes that file and documents its lines. Numbers and
 * structures are those of NVIDIA's nvml.h (CUDA 13). Without the variable there is "no driver". */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9,
       FUNCTION_NOT_FOUND = 13 };
enum { MAX_GPUS = 16, MAX_LINKS = 18, MAX_PROCESSES = 8, MAX_WORDS = 64, SWITCH = 2, SWITCH_LINKS_FIELD = 147 };

typedef struct {
    int present, n_links, n_processes, cpus_known, nodes_known;
    char name[96], uuid[96], bus_id[32];
    unsigned long long memory, cpus[MAX_WORDS], nodes[MAX_WORDS];
    int remote[MAX_LINKS]; /* index of the GPU at the other end, -1 for a switch */
    int down[MAX_LINKS];
    unsigned int pid[MAX_PROCESSES];
    unsigned long long used[MAX_PROCESSES];
} Gpu;

typedef struct { char legacy[16]; unsigned int domain, bus, device, id, subsystem; char bus_id[32]; } PciInfo;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned int pid; unsigned long long used; unsigned int gpu_instance, compute_instance; } Process;
typedef struct {
    unsigned int field, scope;
    long long timestamp, latency;
    unsigned int type, result;
    unsigned long long value;
} Field;

static Gpu gpus[MAX_GPUS];
static int n_gpus, ancestors[MAX_GPUS][MAX_GPUS], p2p[MAX_GPUS][MAX_GPUS][8], cuda_version, init_error;
static char driver_version[80], missing[2048];

static int index_of(const Gpu *gpu) { return (int)(gpu - gpus); }

static int is_missing(const char *function) {
    char wanted[96];
    snprintf(wanted, sizeof wanted, " %s ", function);
    return strstr(missing, wanted) != NULL;
}
#define NEED_FUNCTION() do { if (is_missing(__func__)) return FUNCTION_NOT_FOUND; } while (0)

static void add_link(int a, int remote, int count, int is_down) {
    for (; count > 0 && gpus[a].n_links < MAX_LINKS; count--) {
        gpus[a].down[gpus[a].n_links] = is_down;
        gpus[a].remote[gpus[a].n_links++] = remote;
    }
}

static void read_gpu(int i, const char *key, const char *value) {
    Gpu *gpu = &gpus[i];
    unsigned int first, last;
    gpu->present = 1;
    if (i >= n_gpus) n_gpus = i + 1;
    if (!strcmp(key, "name")) snprintf(gpu->name, sizeof gpu->name, "%s", value);
    if (!strcmp(key, "uuid")) snprintf(gpu->uuid, sizeof gpu->uuid, "%s", value);
    if (!strcmp(key, "bus_id")) snprintf(gpu->bus_id, sizeof gpu->bus_id, "%s", value);
    if (!strcmp(key, "memory")) gpu->memory = strtoull(value, NULL, 10);
    if (!strcmp(key, "switch_links")) add_link(i, -1, atoi(value), 0);
    if (!strcmp(key, "node")) {
        gpu->nodes_known = 1;
        gpu->nodes[atoi(value) / 64] |= 1ULL << (atoi(value) % 64);
    }
    if (!strcmp(key, "cpus") && sscanf(value, "%u-%u", &first, &last) == 2) {
        gpu->cpus_known = 1;
        for (; first <= last; first++) gpu->cpus[first / 64] |= 1ULL << (first % 64);
    }
    if (!strcmp(key, "process") && gpu->n_processes < MAX_PROCESSES) {
        sscanf(value, "%u %llu", &gpu->pid[gpu->n_processes], &gpu->used[gpu->n_processes]);
        gpu->n_processes++;
    }
}

static void read_pair(int a, int b, const char *key, const char *value) {
    int capability, status;
    if (!strcmp(key, "ancestor")) ancestors[a][b] = ancestors[b][a] = atoi(value);
    if (!strcmp(key, "nvlinks")) { add_link(a, b, atoi(value), 0); add_link(b, a, atoi(value), 0); }
    if (!strcmp(key, "nvlinks_down")) { add_link(a, b, atoi(value), 1); add_link(b, a, atoi(value), 1); }
    if (!strcmp(key, "p2p") && sscanf(value, "%d %d", &capability, &status) == 2)
        p2p[a][b][capability] = p2p[b][a][capability] = status;
}

static void read_line(const char *line) {
    char key[64], value[512];
    int a, b;
    if (sscanf(line, "gpu %d %63s %511[^\n]", &a, key, value) == 3) read_gpu(a, key, value);
    else if (sscanf(line, "pair %d %d %63s %511[^\n]", &a, &b, key, value) == 4) read_pair(a, b, key, value);
    else if (sscanf(line, "driver %79s", driver_version) == 1) return;
    else if (sscanf(line, "cuda %d", &a) == 1) cuda_version = a;
    else if (sscanf(line, "init_error %d", &a) == 1) init_error = a;
    else if (sscanf(line, "missing %511s", value) == 1 && strlen(missing) + strlen(value) + 2 < sizeof missing) {
        strcat(missing, value);
        strcat(missing, " ");
    }
}

int nvmlInitWithFlags(unsigned int flags) {
    const char *path = getenv("FAKE_NVML_CONFIG");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[1024];
    (void)flags;
    if (!file) return DRIVER_NOT_LOADED;
    memset(gpus, 0, sizeof gpus);
    memset(ancestors, -1, sizeof ancestors);
    memset(p2p, -1, sizeof p2p);
    n_gpus = cuda_version = init_error = 0;
    strcpy(missing, " ");
    while (fgets(line, sizeof line, file)) read_line(line);
    fclose(file);
    return init_error;
}

int nvmlShutdown(void) { return SUCCESS; }

const char *nvmlErrorString(int result) { return result == SUCCESS ? "Success" : "Fake error"; }

int nvmlSystemGetDriverVersion(char *version, unsigned int length) {
    NEED_FUNCTION();
    snprintf(version, length, "%s", driver_version);
    return SUCCESS;
}

int nvmlSystemGetCudaDriverVersion_v2(int *version) {
    NEED_FUNCTION();
    *version = cuda_version;
    return SUCCESS;
}

int nvmlDeviceGetCount_v2(unsigned int *count) {
    *count = (unsigned int)n_gpus;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, Gpu **gpu) {
    if (index >= (unsigned int)n_gpus || !gpus[index].present) return INVALID_ARGUMENT;
    *gpu = &gpus[index];
    return SUCCESS;
}

int nvmlDeviceGetName(Gpu *gpu, char *name, unsigned int length) {
    NEED_FUNCTION();
    snprintf(name, length, "%s", gpu->name);
    return SUCCESS;
}

int nvmlDeviceGetUUID(Gpu *gpu, char *uuid, unsigned int length) {
    snprintf(uuid, length, "%s", gpu->uuid);
    return SUCCESS;
}

int nvmlDeviceGetPciInfo_v3(Gpu *gpu, PciInfo *info) {
    memset(info, 0, sizeof *info);
    snprintf(info->bus_id, sizeof info->bus_id, "%s", gpu->bus_id);
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(Gpu *gpu, Memory *memory) {
    NEED_FUNCTION();
    memory->total = memory->free = gpu->memory;
    memory->used = 0;
    return SUCCESS;
}

static int copy_set(int known, unsigned long long *to, unsigned int words, const unsigned long long *from) {
    if (!known) return NOT_SUPPORTED;
    if (words > MAX_WORDS) words = MAX_WORDS;
    memcpy(to, from, words * sizeof *to);
    return SUCCESS;
}

int nvmlDeviceGetMemoryAffinity(Gpu *gpu, unsigned int words, unsigned long long *set, unsigned int scope) {
    NEED_FUNCTION();
    (void)scope;
    return copy_set(gpu->nodes_known, set, words, gpu->nodes);
}

int nvmlDeviceGetCpuAffinity(Gpu *gpu, unsigned int words, unsigned long long *set) {
    NEED_FUNCTION();
    return copy_set(gpu->cpus_known, set, words, gpu->cpus);
}

int nvmlDeviceGetNvLinkState(Gpu *gpu, unsigned int link, unsigned int *active) {
    NEED_FUNCTION();
    if (link >= (unsigned int)gpu->n_links) return gpu->n_links ? INVALID_ARGUMENT : NOT_SUPPORTED;
    *active = !gpu->down[link];
    return SUCCESS;
}

int nvmlDeviceGetNvLinkRemoteDeviceType(Gpu *gpu, unsigned int link, unsigned int *type) {
    NEED_FUNCTION();
    *type = gpu->remote[link] < 0 ? SWITCH : 0;
    return SUCCESS;
}

int nvmlDeviceGetNvLinkRemotePciInfo_v2(Gpu *gpu, unsigned int link, PciInfo *info) {
    NEED_FUNCTION();
    if (gpu->remote[link] >= 0) return nvmlDeviceGetPciInfo_v3(&gpus[gpu->remote[link]], info);
    memset(info, 0, sizeof *info);
    snprintf(info->bus_id, sizeof info->bus_id, "00000000:C0:00.0");
    return SUCCESS;
}

int nvmlDeviceGetFieldValues(Gpu *gpu, int count, Field *fields) {
    NEED_FUNCTION();
    for (int i = 0; i < count; i++) {
        fields[i].result = fields[i].field == SWITCH_LINKS_FIELD ? SUCCESS : NOT_SUPPORTED;
        fields[i].value = 0;
        for (int link = 0; link < gpu->n_links; link++) fields[i].value += gpu->remote[link] < 0;
    }
    return SUCCESS;
}

int nvmlDeviceGetTopologyCommonAncestor(Gpu *a, Gpu *b, unsigned int *level) {
    int ancestor = ancestors[index_of(a)][index_of(b)];
    NEED_FUNCTION();
    if (ancestor < 0) return NOT_SUPPORTED;
    *level = (unsigned int)ancestor;
    return SUCCESS;
}

int nvmlDeviceGetP2PStatus(Gpu *a, Gpu *b, unsigned int capability, unsigned int *status) {
    NEED_FUNCTION();
    if (capability >= 8 || p2p[index_of(a)][index_of(b)][capability] < 0) return NOT_SUPPORTED;
    *status = (unsigned int)p2p[index_of(a)][index_of(b)][capability];
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(Gpu *gpu, unsigned int *count, Process *processes) {
    unsigned int room = *count;
    NEED_FUNCTION();
    *count = (unsigned int)gpu->n_processes;
    if (gpu->n_processes == 0) return SUCCESS;
    if (room < *count) return INSUFFICIENT_SIZE;
    for (unsigned int i = 0; i < *count; i++) {
        memset(&processes[i], 0, sizeof processes[i]);
        processes[i].pid = gpu->pid[i];
        processes[i].used = gpu->used[i];
    }
    return SUCCESS;
}
