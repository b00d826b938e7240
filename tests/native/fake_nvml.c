/* A small libnvidia-ml.so.1 for tests: the functions that the real pynvml calls for a topology, for process lists and
 * for telemetry, answered from the JSON file that FAKE_NVML_CONFIG names; tests/native/README.md describes the file.
 * It is read again at each nvmlInit, by the process functions at each call, and with the utilisation. Numbers and
 * structures are those of NVIDIA's nvml.h (CUDA 13). Without the variable there is "no driver". Processes may also be real ones: see FAKE_NVML_CONTEXTS. */

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7,
       DRIVER_NOT_LOADED = 9, FUNCTION_NOT_FOUND = 13, GPU_IS_LOST = 15, VERSION_MISMATCH = 25, UNKNOWN = 999 };
enum { MAX_GPUS = 72, MAX_LINKS = 36, MAX_DEPTH = 64, MAX_PROCESSES = 256 };
enum { TYPE_GPU = 0, TYPE_SWITCH = 2, TYPE_UNKNOWN = 255, UNSIGNED_INT = 1, UNSIGNED_LONG_LONG = 3 };
enum { FIELD_SPEED_L0 = 84, FIELD_SPEED_L6 = 132, FIELD_SWITCH_LINKS = 147, FIELD_SPEED = 164 };
enum { CLOCK_SM = 1, PCIE_RX = 1, UNCORRECTED = 1 };
static const unsigned long long NOT_AVAILABLE = ~0ULL; /* NVML_VALUE_NOT_AVAILABLE */

/* ---- JSON (RFC 8259) ------------------------------------------------------------------------------------------ */

typedef enum { JSON_NULL, JSON_FALSE, JSON_TRUE, JSON_NUMBER, JSON_STRING, JSON_ARRAY, JSON_OBJECT } Kind;

typedef struct Json {
    Kind kind;
    long long number;      /* whole part; what lies above LLONG_MAX is not needed here */
    char *text;            /* of a string */
    size_t size, room;     /* of an array or object */
    struct Json **items;
    char **keys;           /* of an object */
} Json;

typedef struct { const char *start, *at; int depth; const char *error; } Reader;

static Json *read_value(Reader *reader);

static void free_json(Json *json) {
    if (!json) return;
    for (size_t i = 0; i < json->size; i++) {
        free_json(json->items[i]);
        if (json->keys) free(json->keys[i]);
    }
    free(json->items);
    free(json->keys);
    free(json->text);
    free(json);
}

static Json *new_json(Kind kind) {
    Json *json = calloc(1, sizeof *json);
    if (!json) abort();
    json->kind = kind;
    return json;
}

static void *fail(Reader *reader, const char *error) {
    if (!reader->error) reader->error = error;
    return NULL;
}

static void skip_blanks(Reader *reader) { reader->at += strspn(reader->at, " \t\r\n"); }

static int take(Reader *reader, char wanted) {
    skip_blanks(reader);
    if (*reader->at != wanted) return 0;
    reader->at++;
    return 1;
}

static void append(Json *json, char *key, Json *item) {
    if (json->size == json->room) {
        json->room = json->room ? 2 * json->room : 8;
        json->items = realloc(json->items, json->room * sizeof *json->items);
        if (json->kind == JSON_OBJECT) json->keys = realloc(json->keys, json->room * sizeof *json->keys);
        if (!json->items || (json->kind == JSON_OBJECT && !json->keys)) abort();
    }
    if (json->kind == JSON_OBJECT) json->keys[json->size] = key;
    json->items[json->size++] = item;
}

static int read_hex4(Reader *reader, unsigned *code) {
    *code = 0;
    for (int i = 0; i < 4; i++, reader->at++) {
        const char *digits = "0123456789abcdef";
        char digit = *reader->at >= 'A' && *reader->at <= 'F' ? (char)(*reader->at + 32) : *reader->at;
        const char *found = digit ? strchr(digits, digit) : NULL;
        if (!found) return 0;
        *code = 16 * *code + (unsigned)(found - digits);
    }
    return 1;
}

static char *put_utf8(char *to, unsigned code) {
    if (code < 0x80) { *to++ = (char)code; return to; }
    if (code < 0x800) *to++ = (char)(0xC0 | code >> 6);
    else if (code < 0x10000) { *to++ = (char)(0xE0 | code >> 12); *to++ = (char)(0x80 | (code >> 6 & 0x3F)); }
    else {
        *to++ = (char)(0xF0 | code >> 18);
        *to++ = (char)(0x80 | (code >> 12 & 0x3F));
        *to++ = (char)(0x80 | (code >> 6 & 0x3F));
    }
    *to++ = (char)(0x80 | (code & 0x3F));
    return to;
}

static char *read_unicode(Reader *reader, char *to) {
    unsigned code, low;
    if (!read_hex4(reader, &code)) return fail(reader, "four hexadecimal digits expected");
    if (code >= 0xD800 && code < 0xDC00) {
        if (strncmp(reader->at, "\\u", 2)) return fail(reader, "second half of a surrogate pair expected");
        reader->at += 2;
        if (!read_hex4(reader, &low) || low < 0xDC00 || low > 0xDFFF) return fail(reader, "not a surrogate pair");
        code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    return put_utf8(to, code);
}

static char *read_escape(Reader *reader, char *to) {
    static const char names[] = "\"\\/bfnrt", meant[] = "\"\\/\b\f\n\r\t";
    char name = *reader->at++;
    const char *found = name ? strchr(names, name) : NULL;
    if (name == 'u') return read_unicode(reader, to);
    if (!found) return fail(reader, "unknown escape");
    *to++ = meant[found - names];
    return to;
}

/* The text of a string; its opening quote has been taken. An escape is never shorter than what it stands for. */
static char *read_text(Reader *reader) {
    char *text = malloc(strlen(reader->at) + 1), *to = text;
    if (!text) abort();
    while (to && *reader->at != '"') {
        if ((unsigned char)*reader->at < 0x20) to = fail(reader, "end of the string expected");
        else if (*reader->at != '\\') *to++ = *reader->at++;
        else { reader->at++; to = read_escape(reader, to); }
    }
    if (!to) { free(text); return NULL; }
    reader->at++;
    *to = 0;
    return text;
}

static Json *read_string(Reader *reader) {
    char *text = read_text(reader);
    Json *json = text ? new_json(JSON_STRING) : NULL;
    if (json) json->text = text;
    return json;
}

static int skip_digits(Reader *reader) {
    size_t count = strspn(reader->at, "0123456789");
    reader->at += count;
    return count > 0;
}

static Json *read_number(Reader *reader) {
    const char *start = reader->at;
    Json *json;
    if (*reader->at == '-') reader->at++;
    if (*reader->at == '0') reader->at++;
    else if (!skip_digits(reader)) return fail(reader, "a value expected");
    if (*reader->at == '.') { reader->at++; if (!skip_digits(reader)) return fail(reader, "digits expected"); }
    if (*reader->at == 'e' || *reader->at == 'E') {
        reader->at++;
        if (*reader->at == '+' || *reader->at == '-') reader->at++;
        if (!skip_digits(reader)) return fail(reader, "digits of the exponent expected");
    }
    json = new_json(JSON_NUMBER);
    json->number = strcspn(start, ".eE") < (size_t)(reader->at - start) ? (long long)strtod(start, NULL)
                                                                        : strtoll(start, NULL, 10);
    return json;
}

static Json *read_word(Reader *reader, const char *word, Kind kind) {
    if (strncmp(reader->at, word, strlen(word))) return fail(reader, "a value expected");
    reader->at += strlen(word);
    return new_json(kind);
}

static int read_member(Reader *reader, Json *json) {
    char *key = NULL;
    Json *item;
    if (json->kind == JSON_OBJECT) {
        if (!take(reader, '"')) { fail(reader, "a name in quotes expected"); return 0; }
        key = read_text(reader);
        if (!key) return 0;
        if (!take(reader, ':')) { free(key); fail(reader, "a colon expected"); return 0; }
    }
    item = read_value(reader);
    if (!item) { free(key); return 0; }
    append(json, key, item);
    return 1;
}

static Json *read_members(Reader *reader, Kind kind, char end) {
    Json *json = new_json(kind);
    if (take(reader, end)) return json;
    do {
        if (!read_member(reader, json)) { free_json(json); return NULL; }
    } while (take(reader, ','));
    if (take(reader, end)) return json;
    free_json(json);
    return fail(reader, "a comma or the end of the list expected");
}

static Json *read_value(Reader *reader) {
    Json *json;
    if (reader->depth == MAX_DEPTH) return fail(reader, "nested too deeply");
    reader->depth++;
    skip_blanks(reader);
    if (take(reader, '{')) json = read_members(reader, JSON_OBJECT, '}');
    else if (take(reader, '[')) json = read_members(reader, JSON_ARRAY, ']');
    else if (take(reader, '"')) json = read_string(reader);
    else if (*reader->at == 't') json = read_word(reader, "true", JSON_TRUE);
    else if (*reader->at == 'f') json = read_word(reader, "false", JSON_FALSE);
    else if (*reader->at == 'n') json = read_word(reader, "null", JSON_NULL);
    else json = read_number(reader);
    reader->depth--;
    return json;
}

static Json *read_json(const char *text) {
    Reader reader = {text, text, 0, NULL};
    Json *json = read_value(&reader);
    skip_blanks(&reader);
    if (json && *reader.at) {
        fail(&reader, "the end of the file expected");
        free_json(json);
        json = NULL;
    }
    if (!json) fprintf(stderr, "fake NVML: %s at byte %ld\n", reader.error, (long)(reader.at - reader.start));
    return json;
}

static const Json *get(const Json *json, const char *key) {
    if (!json || json->kind != JSON_OBJECT) return NULL;
    for (size_t i = 0; i < json->size; i++)
        if (!strcmp(json->keys[i], key)) return json->items[i];
    return NULL;
}

static const Json *item(const Json *json, size_t i) {
    return json && json->kind == JSON_ARRAY && i < json->size ? json->items[i] : NULL;
}

static size_t size_of(const Json *json) { return json && json->kind == JSON_ARRAY ? json->size : 0; }
static int is_number(const Json *json) { return json && json->kind == JSON_NUMBER; }
static const char *text_of(const Json *json) { return json && json->kind == JSON_STRING ? json->text : NULL; }
static long long number_of(const Json *json, long long other) { return is_number(json) ? json->number : other; }

/* ---- The machine ----------------------------------------------------------------------------------------------- */

typedef struct { int calls; } Gpu; /* a handle; it stays valid while the file is read again */

static Gpu gpus[MAX_GPUS];
static Json *machine;

static char *read_file(const char *path) {
    FILE *file = path ? fopen(path, "rb") : NULL;
    char *text = NULL;
    size_t size = 0, room = 0, got = 1;
    if (!file) return NULL;
    while (got > 0) {
        if (room < size + 65536 && !(text = realloc(text, (room = 2 * room + 65536) + 1))) abort();
        got = fread(text + size, 1, room - size, file);
        size += got;
    }
    fclose(file);
    text[size] = 0;
    return text;
}

static int read_machine(void) {
    char *text = read_file(getenv("FAKE_NVML_CONFIG"));
    Json *json;
    if (!text) return DRIVER_NOT_LOADED;
    json = read_json(text);
    free(text);
    if (!json) return UNKNOWN;
    free_json(machine);
    machine = json;
    return SUCCESS;
}

static int index_of(const Gpu *gpu) { return (int)(gpu - gpus); }
static const Json *about(const Gpu *gpu) { return item(get(machine, "gpus"), (size_t)index_of(gpu)); }

static const Json *of_pair(const Json *json, const Gpu *a, const Gpu *b) {
    char key[32];
    int first = index_of(a), second = index_of(b);
    snprintf(key, sizeof key, "%d-%d", first < second ? first : second, first < second ? second : first);
    return get(json, key);
}

/* What "errors" says for a function and the GPUs it is asked about (NULL where there is none). */
static int listed_error(const char *function, const Gpu *a, const Gpu *b) {
    const Json *errors = get(get(machine, "errors"), function), *found = a && b ? of_pair(errors, a, b) : NULL;
    const Gpu *ends[] = {a, b};
    char key[16];
    for (int i = 0; i < 2 && !found; i++) {
        if (!ends[i]) continue;
        snprintf(key, sizeof key, "%d", index_of(ends[i]));
        found = get(errors, key);
    }
    return (int)number_of(is_number(errors) ? errors : found, SUCCESS);
}

static int is_lost(Gpu *gpu) {
    return gpu && gpu->calls++ >= number_of(get(about(gpu), "lost_after"), 1LL << 40);
}

static int trouble(const char *function, Gpu *a, Gpu *b) {
    const Json *missing = get(machine, "missing");
    int a_is_lost, b_is_lost;
    for (size_t i = 0; i < size_of(missing); i++)
        if (text_of(item(missing, i)) && !strcmp(text_of(item(missing, i)), function)) return FUNCTION_NOT_FOUND;
    a_is_lost = is_lost(a);
    b_is_lost = is_lost(b);
    return a_is_lost || b_is_lost ? GPU_IS_LOST : listed_error(function, a, b);
}

#define ANSWER_OR(a, b) do { int error_ = trouble(__func__, a, b); if (error_) return error_; } while (0)

static int copy_text(const Json *from, char *to, unsigned length) {
    if (!text_of(from)) return NOT_SUPPORTED;
    if (strlen(text_of(from)) >= length) return INSUFFICIENT_SIZE;
    strcpy(to, text_of(from));
    return SUCCESS;
}

static int copy_number(const Json *from, unsigned *to) {
    if (!is_number(from)) return NOT_SUPPORTED;
    *to = (unsigned)from->number;
    return SUCCESS;
}

/* ---- System ---------------------------------------------------------------------------------------------------- */

int nvmlInitWithFlags(unsigned flags) {
    int result = read_machine();
    (void)flags;
    memset(gpus, 0, sizeof gpus);
    return result ? result : (int)number_of(get(machine, "init_error"), SUCCESS);
}

int nvmlShutdown(void) { return SUCCESS; }

const char *nvmlErrorString(int result) { return result == SUCCESS ? "Success" : "Fake error"; }

int nvmlSystemGetDriverVersion(char *version, unsigned length) {
    ANSWER_OR(NULL, NULL);
    return copy_text(get(machine, "driver"), version, length);
}

int nvmlSystemGetNVMLVersion(char *version, unsigned length) {
    ANSWER_OR(NULL, NULL);
    return copy_text(get(machine, "nvml"), version, length);
}

int nvmlSystemGetCudaDriverVersion(unsigned *version) {
    ANSWER_OR(NULL, NULL);
    return copy_number(get(machine, "cuda"), version);
}

int nvmlSystemGetCudaDriverVersion_v2(unsigned *version) {
    ANSWER_OR(NULL, NULL);
    return copy_number(get(machine, "cuda"), version);
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    ANSWER_OR(NULL, NULL);
    *count = (unsigned)size_of(get(machine, "gpus"));
    return *count > MAX_GPUS ? UNKNOWN : SUCCESS;
}

/* ---- One GPU --------------------------------------------------------------------------------------------------- */

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Gpu **gpu) {
    if (index >= size_of(get(machine, "gpus"))) return INVALID_ARGUMENT;
    ANSWER_OR(&gpus[index], NULL);
    *gpu = &gpus[index];
    return SUCCESS;
}

int nvmlDeviceGetName(Gpu *gpu, char *name, unsigned length) {
    ANSWER_OR(gpu, NULL);
    return copy_text(get(about(gpu), "name"), name, length);
}

int nvmlDeviceGetUUID(Gpu *gpu, char *uuid, unsigned length) {
    ANSWER_OR(gpu, NULL);
    return copy_text(get(about(gpu), "uuid"), uuid, length);
}

typedef struct { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; } PciInfo;

static int copy_bus_id(const char *bus_id, PciInfo *info) {
    memset(info, 0, sizeof *info);
    if (!bus_id) return NOT_SUPPORTED;
    snprintf(info->bus_id, sizeof info->bus_id, "%s", bus_id);
    return SUCCESS;
}

int nvmlDeviceGetPciInfo_v3(Gpu *gpu, PciInfo *info) {
    ANSWER_OR(gpu, NULL);
    return copy_bus_id(text_of(get(about(gpu), "bus_id")), info);
}

typedef struct { unsigned long long total, free, used; } Memory;

int nvmlDeviceGetMemoryInfo(Gpu *gpu, Memory *memory) {
    ANSWER_OR(gpu, NULL);
    if (!is_number(get(about(gpu), "memory_total"))) return NOT_SUPPORTED;
    memory->total = (unsigned long long)number_of(get(about(gpu), "memory_total"), 0);
    memory->used = (unsigned long long)number_of(get(about(gpu), "memory_used"), 0);
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

/* Bits of a list such as "0-13,28-41" in an array of 64-bit words. */
static int copy_set(const char *list, unsigned long long *set, unsigned words) {
    if (!list) return NOT_SUPPORTED;
    memset(set, 0, words * sizeof *set);
    while (*list) {
        char *end;
        unsigned long first = strtoul(list, &end, 10), last = *end == '-' ? strtoul(end + 1, &end, 10) : first;
        for (; first <= last && first / 64 < words; first++) set[first / 64] |= 1ULL << first % 64;
        list = *end == ',' ? end + 1 : "";
    }
    return SUCCESS;
}

int nvmlDeviceGetMemoryAffinity(Gpu *gpu, unsigned words, unsigned long long *set, unsigned scope) {
    ANSWER_OR(gpu, NULL);
    (void)scope;
    return copy_set(text_of(get(about(gpu), "nodes")), set, words);
}

int nvmlDeviceGetCpuAffinity(Gpu *gpu, unsigned words, unsigned long long *set) {
    ANSWER_OR(gpu, NULL);
    return copy_set(text_of(get(about(gpu), "cpus")), set, words);
}

int nvmlDeviceGetNumaNodeId(Gpu *gpu, unsigned *node) {
    ANSWER_OR(gpu, NULL);
    return copy_number(get(about(gpu), "numa_id"), node);
}

int nvmlDeviceGetMigMode(Gpu *gpu, unsigned *current, unsigned *pending) {
    const Json *mode = get(about(gpu), "mig");
    ANSWER_OR(gpu, NULL);
    if (!mode || mode->kind == JSON_NULL) return NOT_SUPPORTED;
    *current = *pending = mode->kind == JSON_TRUE;
    return SUCCESS;
}

static int copy_pcie(const Gpu *gpu, const char *key, unsigned *to) {
    return copy_number(get(get(about(gpu), "pcie"), key), to);
}

int nvmlDeviceGetCurrPcieLinkGeneration(Gpu *gpu, unsigned *to) {
    ANSWER_OR(gpu, NULL);
    return copy_pcie(gpu, "generation", to);
}

int nvmlDeviceGetCurrPcieLinkWidth(Gpu *gpu, unsigned *to) {
    ANSWER_OR(gpu, NULL);
    return copy_pcie(gpu, "width", to);
}

int nvmlDeviceGetMaxPcieLinkGeneration(Gpu *gpu, unsigned *to) {
    ANSWER_OR(gpu, NULL);
    return copy_pcie(gpu, "max_generation", to);
}

int nvmlDeviceGetMaxPcieLinkWidth(Gpu *gpu, unsigned *to) {
    ANSWER_OR(gpu, NULL);
    return copy_pcie(gpu, "max_width", to);
}

typedef struct { unsigned char uuid[16]; int status; unsigned clique, state; } Fabric;
typedef struct { unsigned version; unsigned char uuid[16]; int status; unsigned clique, state, health; } FabricV2;
enum { FABRIC_V2 = 0x02000024 };

static int copy_fabric(const Gpu *gpu, Fabric *to) {
    const Json *fabric = get(about(gpu), "fabric");
    const char *digits = text_of(get(fabric, "cluster_uuid"));
    if (!fabric) return NOT_SUPPORTED;
    memset(to, 0, sizeof *to);
    for (int i = 0; digits && *digits && i < 16; digits += 2) {
        unsigned byte;
        if (*digits == '-') digits++;
        if (sscanf(digits, "%2x", &byte) == 1) to->uuid[i++] = (unsigned char)byte;
    }
    to->status = (int)number_of(get(fabric, "status"), SUCCESS);
    to->clique = (unsigned)number_of(get(fabric, "clique_id"), 0);
    to->state = (unsigned)number_of(get(fabric, "state"), 0);
    return SUCCESS;
}

int nvmlDeviceGetGpuFabricInfo(Gpu *gpu, Fabric *fabric) {
    ANSWER_OR(gpu, NULL);
    return copy_fabric(gpu, fabric);
}

int nvmlDeviceGetGpuFabricInfoV(Gpu *gpu, FabricV2 *to) {
    Fabric fabric;
    int result;
    ANSWER_OR(gpu, NULL);
    if (to->version != FABRIC_V2) return VERSION_MISMATCH;
    result = copy_fabric(gpu, &fabric);
    if (result) return result;
    memcpy(to->uuid, fabric.uuid, sizeof to->uuid);
    to->status = fabric.status;
    to->clique = fabric.clique;
    to->state = fabric.state;
    to->health = 0;
    return SUCCESS;
}

/* ---- NVLinks --------------------------------------------------------------------------------------------------- */

/* The description of a link: an entry with "count" stands for as many links. */
static const Json *link_of(const Gpu *gpu, unsigned link) {
    const Json *links = get(about(gpu), "nvlinks");
    for (size_t i = 0; i < size_of(links) && link < MAX_LINKS; i++) {
        unsigned count = (unsigned)number_of(get(item(links, i), "count"), 1);
        if (link < count) return item(links, i);
        link -= count;
    }
    return NULL;
}

static int link_trouble(const char *function, Gpu *gpu, unsigned link) {
    int error = trouble(function, gpu, NULL);
    if (error) return error;
    if (!link_of(gpu, link)) return link_of(gpu, 0) ? INVALID_ARGUMENT : NOT_SUPPORTED;
    return (int)number_of(get(get(link_of(gpu, link), "errors"), function), SUCCESS);
}

#define LINK_ANSWER_OR(gpu, link) \
    do { int error_ = link_trouble(__func__, gpu, link); if (error_) return error_; } while (0)

int nvmlDeviceGetNvLinkState(Gpu *gpu, unsigned link, unsigned *active) {
    LINK_ANSWER_OR(gpu, link);
    return copy_number(get(link_of(gpu, link), "state"), active);
}

int nvmlDeviceGetNvLinkVersion(Gpu *gpu, unsigned link, unsigned *version) {
    LINK_ANSWER_OR(gpu, link);
    return copy_number(get(link_of(gpu, link), "version"), version);
}

static int ends_at_switch(const Gpu *gpu, unsigned link) {
    const char *remote = text_of(get(link_of(gpu, link), "remote"));
    return remote && !strcmp(remote, "switch");
}

int nvmlDeviceGetNvLinkRemoteDeviceType(Gpu *gpu, unsigned link, unsigned *type) {
    const Json *given = get(link_of(gpu, link), "type");
    LINK_ANSWER_OR(gpu, link);
    *type = is_number(get(link_of(gpu, link), "remote")) ? TYPE_GPU : TYPE_UNKNOWN;
    if (ends_at_switch(gpu, link)) *type = TYPE_SWITCH;
    if (is_number(given)) *type = (unsigned)given->number;
    return SUCCESS;
}

int nvmlDeviceGetNvLinkRemotePciInfo_v2(Gpu *gpu, unsigned link, PciInfo *info) {
    const Json *remote = get(link_of(gpu, link), "remote");
    LINK_ANSWER_OR(gpu, link);
    if (ends_at_switch(gpu, link)) return copy_bus_id("00000000:C0:00.0", info);
    if (is_number(remote)) remote = get(item(get(machine, "gpus"), (size_t)remote->number), "bus_id");
    return copy_bus_id(text_of(remote), info);
}

typedef struct {
    unsigned field, scope;
    long long timestamp, latency;
    unsigned type, result;
    unsigned long long value;
} Field;

static int field_value(const Gpu *gpu, Field *field) {
    const Json *known = get(get(about(gpu), "telemetry"), "fields");
    unsigned id = field->field, link = field->scope, value = 0;
    const Json *error;
    char key[16], key_of_scope[32];
    int result;
    snprintf(key, sizeof key, "%u", id);
    snprintf(key_of_scope, sizeof key_of_scope, "%u:%u", id, field->scope);
    error = get(get(machine, "field_errors"), key);
    if (error) return (int)number_of(error, UNKNOWN);
    if (get(known, key_of_scope) || get(known, key)) {
        field->type = UNSIGNED_LONG_LONG;
        field->value = (unsigned long long)number_of(get(known, get(known, key_of_scope) ? key_of_scope : key), 0);
        return SUCCESS;
    }
    field->type = UNSIGNED_INT;
    if (id == FIELD_SWITCH_LINKS) {
        for (link = 0; link_of(gpu, link); link++)
            value += ends_at_switch(gpu, link) && number_of(get(link_of(gpu, link), "state"), 0) == 1;
        field->value = value;
        return SUCCESS;
    }
    if (id >= FIELD_SPEED_L0 && id < FIELD_SPEED_L0 + 6) link = id - FIELD_SPEED_L0;
    else if (id >= FIELD_SPEED_L6 && id < FIELD_SPEED_L6 + 6) link = id - FIELD_SPEED_L6 + 6;
    else if (id != FIELD_SPEED) return NOT_SUPPORTED;
    result = copy_number(get(link_of(gpu, link), "speed"), &value);
    field->value = value;
    return result;
}

int nvmlDeviceGetFieldValues(Gpu *gpu, int count, Field *fields) {
    ANSWER_OR(gpu, NULL);
    for (int i = 0; i < count; i++) {
        fields[i].value = 0;
        fields[i].result = (unsigned)field_value(gpu, &fields[i]);
    }
    return SUCCESS;
}

/* ---- Telemetry ------------------------------------------------------------------------------------------------- */

static int copy_telemetry(const Gpu *gpu, const char *key, unsigned *to) {
    return copy_number(get(get(about(gpu), "telemetry"), key), to);
}

static int copy_long_telemetry(const Gpu *gpu, const char *key, unsigned long long *to) {
    const Json *from = get(get(about(gpu), "telemetry"), key);
    if (!is_number(from)) return NOT_SUPPORTED;
    *to = (unsigned long long)from->number;
    return SUCCESS;
}

static int handle_by(const char *function, const char *key, const char *wanted, Gpu **gpu) {
    for (size_t i = 0; i < size_of(get(machine, "gpus")); i++) {
        const char *found = text_of(get(item(get(machine, "gpus"), i), key));
        int error;
        if (!found || strcmp(found, wanted)) continue;
        error = trouble(function, &gpus[i], NULL);
        *gpu = &gpus[i];
        return error;
    }
    return NOT_FOUND;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, Gpu **gpu) { return handle_by(__func__, "uuid", uuid, gpu); }

int nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, Gpu **gpu) {
    return handle_by(__func__, "bus_id", bus_id, gpu);
}

typedef struct { unsigned gpu, memory; } Utilization;

int nvmlDeviceGetUtilizationRates(Gpu *gpu, Utilization *to) {
    int result;
    read_machine(); /* the first question of a reading: a test can change what the GPU does */
    ANSWER_OR(gpu, NULL);
    result = copy_telemetry(gpu, "utilization", &to->gpu);
    return result ? result : copy_telemetry(gpu, "memory_utilization", &to->memory);
}

int nvmlDeviceGetClockInfo(Gpu *gpu, unsigned type, unsigned *mhz) {
    ANSWER_OR(gpu, NULL);
    return copy_telemetry(gpu, type == CLOCK_SM ? "sm_clock" : "memory_clock", mhz);
}

int nvmlDeviceGetPowerUsage(Gpu *gpu, unsigned *milliwatts) {
    ANSWER_OR(gpu, NULL);
    return copy_telemetry(gpu, "power_mw", milliwatts);
}

int nvmlDeviceGetEnforcedPowerLimit(Gpu *gpu, unsigned *milliwatts) {
    ANSWER_OR(gpu, NULL);
    return copy_telemetry(gpu, "power_limit_mw", milliwatts);
}

int nvmlDeviceGetPowerManagementLimit(Gpu *gpu, unsigned *milliwatts) {
    ANSWER_OR(gpu, NULL);
    return copy_telemetry(gpu, "set_power_limit_mw", milliwatts);
}

int nvmlDeviceGetPowerManagementDefaultLimit(Gpu *gpu, unsigned *milliwatts) {
    ANSWER_OR(gpu, NULL);
    return copy_telemetry(gpu, "default_power_limit_mw", milliwatts);
}

int nvmlDeviceGetTemperature(Gpu *gpu, unsigned sensor, unsigned *celsius) {
    ANSWER_OR(gpu, NULL);
    (void)sensor;
    return copy_telemetry(gpu, "temperature", celsius);
}

typedef struct { unsigned version, sensor; int celsius; } Temperature;
enum { TEMPERATURE_V1 = 0x0100000C };

int nvmlDeviceGetTemperatureV(Gpu *gpu, Temperature *to) {
    unsigned celsius = 0;
    int result;
    ANSWER_OR(gpu, NULL);
    if (to->version != TEMPERATURE_V1) return VERSION_MISMATCH;
    result = copy_telemetry(gpu, "temperature", &celsius);
    to->celsius = (int)celsius;
    return result;
}

int nvmlDeviceGetCurrentClocksEventReasons(Gpu *gpu, unsigned long long *bits) {
    ANSWER_OR(gpu, NULL);
    return copy_long_telemetry(gpu, "reasons", bits);
}

int nvmlDeviceGetCurrentClocksThrottleReasons(Gpu *gpu, unsigned long long *bits) {
    ANSWER_OR(gpu, NULL);
    return copy_long_telemetry(gpu, "reasons", bits);
}

int nvmlDeviceGetPcieThroughput(Gpu *gpu, unsigned counter, unsigned *kilobytes) {
    ANSWER_OR(gpu, NULL);
    return copy_telemetry(gpu, counter == PCIE_RX ? "pcie_rx_kb" : "pcie_tx_kb", kilobytes);
}

int nvmlDeviceGetPcieReplayCounter(Gpu *gpu, unsigned *count) {
    ANSWER_OR(gpu, NULL);
    return copy_telemetry(gpu, "pcie_replays", count);
}

int nvmlDeviceGetTotalEccErrors(Gpu *gpu, unsigned error, unsigned counter, unsigned long long *count) {
    ANSWER_OR(gpu, NULL);
    (void)counter;
    return copy_long_telemetry(gpu, error == UNCORRECTED ? "ecc_uncorrected" : "ecc_corrected", count);
}

/* ---- Pairs ----------------------------------------------------------------------------------------------------- */

static const Json *about_pair(const Gpu *a, const Gpu *b, const char *key) {
    const Json *pairs = get(machine, "pairs"), *pair = of_pair(pairs, a, b);
    return get(pair ? pair : get(pairs, "default"), key);
}

int nvmlDeviceGetTopologyCommonAncestor(Gpu *a, Gpu *b, unsigned *level) {
    ANSWER_OR(a, b);
    return copy_number(about_pair(a, b, "ancestor"), level);
}

int nvmlDeviceGetP2PStatus(Gpu *a, Gpu *b, unsigned capability, unsigned *status) {
    char key[16];
    ANSWER_OR(a, b);
    snprintf(key, sizeof key, "%u", capability);
    return copy_number(get(about_pair(a, b, "p2p"), key), status);
}

/* ---- Processes ------------------------------------------------------------------------------------------------- */

typedef struct { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; } Process;

static void add_process(Process *all, unsigned *count, unsigned pid, const Json *bytes) {
    if (*count == MAX_PROCESSES) abort();
    all[*count].pid = pid;
    all[*count].used = is_number(bytes) ? (unsigned long long)bytes->number : NOT_AVAILABLE;
    all[*count].gpu_instance = all[*count].compute_instance = ~0U;
    ++*count;
}

/* The contexts of a process that lives. It holds a lock on its file, which the kernel frees with the process as a
 * driver frees its contexts: a file that can be locked is that of a process that has ended. */
static Json *read_contexts(const char *path) {
    int file = open(path, O_RDONLY | O_CLOEXEC), has_ended;
    char *text;
    Json *json;
    if (file < 0) return NULL;
    has_ended = flock(file, LOCK_SH | LOCK_NB) == 0;
    close(file);
    text = has_ended ? NULL : read_file(path);
    json = text ? read_json(text) : NULL;
    free(text);
    return json;
}

/* Real processes: FAKE_NVML_CONTEXTS names a folder with a file PID.json for each. */
static void add_contexts(const char *uuid, Process *all, unsigned *count) {
    const char *folder = getenv("FAKE_NVML_CONTEXTS");
    DIR *entries = folder && uuid ? opendir(folder) : NULL;
    const struct dirent *entry;
    if (!entries) return;
    while ((entry = readdir(entries))) {
        char path[4096];
        const char *end = strrchr(entry->d_name, '.');
        Json *json;
        if (!end || strcmp(end, ".json")) continue;
        snprintf(path, sizeof path, "%s/%s", folder, entry->d_name);
        json = read_contexts(path);
        if (get(get(json, "gpus"), uuid))
            add_process(all, count, (unsigned)strtoul(entry->d_name, NULL, 10), get(get(json, "gpus"), uuid));
        free_json(json);
    }
    closedir(entries);
}

static int list_processes(const char *function, Gpu *gpu, const char *key, unsigned *count, Process *to) {
    Process all[MAX_PROCESSES];
    unsigned room = *count, found = 0;
    const Json *list;
    int error;
    read_machine(); /* a file that is not there, or not whole, right now leaves the last one */
    error = trouble(function, gpu, NULL);
    if (error) return error;
    list = get(about(gpu), key);
    for (size_t i = 0; i < size_of(list); i++)
        add_process(all, &found, (unsigned)number_of(get(item(list, i), "pid"), 0), get(item(list, i), "bytes"));
    if (!strcmp(key, "compute")) add_contexts(text_of(get(about(gpu), "uuid")), all, &found);
    *count = found;
    if (found == 0) return SUCCESS;
    if (room < found) return INSUFFICIENT_SIZE;
    memcpy(to, all, found * sizeof *all);
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(Gpu *gpu, unsigned *count, Process *to) {
    return list_processes(__func__, gpu, "compute", count, to);
}

int nvmlDeviceGetComputeRunningProcesses_v2(Gpu *gpu, unsigned *count, Process *to) {
    return list_processes(__func__, gpu, "compute", count, to);
}

int nvmlDeviceGetMPSComputeRunningProcesses_v3(Gpu *gpu, unsigned *count, Process *to) {
    return list_processes(__func__, gpu, "mps", count, to);
}

int nvmlDeviceGetMPSComputeRunningProcesses_v2(Gpu *gpu, unsigned *count, Process *to) {
    return list_processes(__func__, gpu, "mps", count, to);
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(Gpu *gpu, unsigned *count, Process *to) {
    return list_processes(__func__, gpu, "graphics", count, to);
}

int nvmlDeviceGetGraphicsRunningProcesses_v2(Gpu *gpu, unsigned *count, Process *to) {
    return list_processes(__func__, gpu, "graphics", count, to);
}
