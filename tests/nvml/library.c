/*
 * A library that answers as NVIDIA's libnvidia-ml.so.1 does, for machines without one: the symbols, structures and
 * return codes that are read (training/nvml.py), of devices in any state.
 *
 *     gcc -shared -fPIC -Wall -Wextra -Werror -Wl,-soname,libnvidia-ml.so.1 library.c -o libnvidia-ml.so.1
 *
 * NVML_STATES names a file, read by nvmlInitWithFlags, with a word for a device ("*": every one), a key and a value on
 * each line. "none" as a value: the device cannot tell.
 *
 *     system devices 8
 *     system driver 580.65.06
 *     3 lost 1
 *     * link4 0
 *
 * With -DOLD, what newer drivers have is missing.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    SUCCESS = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9,
    GPU_IS_LOST = 15,
    VERSION_MISMATCH = 25,
};

enum { DEVICES = 16, ENTRIES = 512, WORD = 64 };

typedef struct {
    int index;
} Device;

typedef struct {
    char who[WORD], key[WORD], value[WORD];
} Entry;

static Device devices[DEVICES];
static Entry entries[ENTRIES];
static int entry_count, references;

static const char *find(const char *who, const char *key)
{
    const char *found = NULL;
    for (int i = 0; i < entry_count; i++)
        if (!strcmp(entries[i].key, key) && (!strcmp(entries[i].who, who) || (!found && !strcmp(entries[i].who, "*"))))
            found = entries[i].value;
    return found;
}

static const char *find_of(const Device *device, const char *key)
{
    char who[16];
    snprintf(who, sizeof who, "%d", device->index);
    return find(who, key);
}

static int check(const Device *device)
{
    if (!references)
        return UNINITIALIZED;
    if (device < devices || device >= devices + DEVICES)
        return INVALID_ARGUMENT;
    const char *lost = find_of(device, "lost");
    return lost && strcmp(lost, "0") ? GPU_IS_LOST : SUCCESS;
}

static int look(const Device *device, const char *key, unsigned long long usual, unsigned long long *value)
{
    int code = check(device);
    if (code)
        return code;
    const char *given = find_of(device, key);
    if (given && !strcmp(given, "none"))
        return NOT_SUPPORTED;
    *value = given ? strtoull(given, NULL, 0) : usual;
    return SUCCESS;
}

static int look_narrow(const Device *device, const char *key, unsigned int usual, unsigned int *value)
{
    unsigned long long wide;
    int code = look(device, key, usual, &wide);
    if (!code)
        *value = (unsigned int)wide;
    return code;
}

static int copy(const char *text, char *to, unsigned int length)
{
    if (strlen(text) >= length)
        return INSUFFICIENT_SIZE;
    strcpy(to, text);
    return SUCCESS;
}

int nvmlInitWithFlags(unsigned int flags)
{
    (void)flags;
    const char *path = getenv("NVML_STATES");
    FILE *file = path ? fopen(path, "r") : NULL;
    entry_count = 0;
    while (file && entry_count < ENTRIES) {
        Entry *entry = &entries[entry_count];
        if (fscanf(file, " %63s %63s %63[^\n]", entry->who, entry->key, entry->value) != 3)
            break;
        entry_count++;
    }
    if (file)
        fclose(file);
    for (int i = 0; i < DEVICES; i++)
        devices[i].index = i;
    if (find("system", "unloaded"))
        return DRIVER_NOT_LOADED;
    references++;
    return SUCCESS;
}

int nvmlShutdown(void)
{
    if (!references)
        return UNINITIALIZED;
    references--;
    return SUCCESS;
}

const char *nvmlErrorString(int code)
{
    switch (code) {
    case SUCCESS: return "Success";
    case UNINITIALIZED: return "Uninitialized";
    case INVALID_ARGUMENT: return "Invalid Argument";
    case NOT_SUPPORTED: return "Not Supported";
    case INSUFFICIENT_SIZE: return "Insufficient Size";
    case DRIVER_NOT_LOADED: return "Driver Not Loaded";
    case GPU_IS_LOST: return "GPU is lost";
    case VERSION_MISMATCH: return "Argument Version Mismatch";
    default: return "Unknown Error";
    }
}

static int answer_system(const char *key, const char *usual, char *to, unsigned int length)
{
    const char *given = find("system", key);
    return references ? copy(given ? given : usual, to, length) : UNINITIALIZED;
}

int nvmlSystemGetDriverVersion(char *version, unsigned int length)
{
    return answer_system("driver", "580.65.06", version, length);
}

int nvmlSystemGetNVMLVersion(char *version, unsigned int length)
{
    return answer_system("nvml", "13.580.65.06", version, length);
}

int nvmlDeviceGetCount_v2(unsigned int *count)
{
    const char *given = find("system", "devices");
    if (!references)
        return UNINITIALIZED;
    *count = given ? (unsigned int)atoi(given) : 2;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, Device **device)
{
    unsigned int count;
    int code = nvmlDeviceGetCount_v2(&count);
    if (code)
        return code;
    if (index >= count || index >= DEVICES)
        return INVALID_ARGUMENT;
    const char *lost = find_of(&devices[index], "lost");
    if (lost && !strcmp(lost, "1")) /* "2": the handle is still given, and nothing more */
        return GPU_IS_LOST;
    *device = &devices[index];
    return SUCCESS;
}

int nvmlDeviceGetName(Device *device, char *name, unsigned int length)
{
    int code = check(device);
    return code ? code : copy("NVIDIA H100 80GB HBM3", name, length);
}

int nvmlDeviceGetUUID(Device *device, char *uuid, unsigned int length)
{
    char text[WORD];
    int code = check(device);
    if (code)
        return code;
    snprintf(text, sizeof text, "GPU-%08d-2b5c-4d1e-8f00-0123456789ab", device->index);
    return copy(text, uuid, length);
}

int nvmlDeviceGetTotalEccErrors(Device *device, unsigned int kind, unsigned int counter, unsigned long long *count)
{
    if (kind > 1 || counter > 1)
        return INVALID_ARGUMENT;
    const char *key = kind == 0 ? "ecc_corrected" : counter == 0 ? "ecc_volatile" : "ecc_aggregate";
    return look(device, key, 0, count);
}

int nvmlDeviceGetRemappedRows(Device *device, unsigned int *correctable, unsigned int *uncorrectable,
                              unsigned int *pending, unsigned int *failed)
{
    int code = look_narrow(device, "remapped_correctable", 0, correctable);
    if (!code)
        code = look_narrow(device, "remapped_uncorrectable", 0, uncorrectable);
    if (!code)
        code = look_narrow(device, "remap_pending", 0, pending);
    return code ? code : look_narrow(device, "remap_failed", 0, failed);
}

#ifndef OLD
typedef struct {
    unsigned int version;
    unsigned int sensor;
    int temperature;
} Temperature;

int nvmlDeviceGetTemperatureV(Device *device, Temperature *temperature)
{
    unsigned int value;
    if (temperature->version != (sizeof(Temperature) | 1u << 24))
        return VERSION_MISMATCH;
    if (temperature->sensor != 0)
        return INVALID_ARGUMENT;
    int code = look_narrow(device, "temperature", 41, &value);
    if (!code)
        temperature->temperature = (int)value;
    return code;
}

int nvmlDeviceGetCurrentClocksEventReasons(Device *device, unsigned long long *reasons)
{
    return look(device, "throttles", 0, reasons);
}
#else
int nvmlDeviceGetTemperature(Device *device, unsigned int sensor, unsigned int *temperature)
{
    return sensor ? INVALID_ARGUMENT : look_narrow(device, "temperature", 41, temperature);
}

int nvmlDeviceGetCurrentClocksThrottleReasons(Device *device, unsigned long long *reasons)
{
    return look(device, "throttles", 0, reasons);
}
#endif

int nvmlDeviceGetTemperatureThreshold(Device *device, unsigned int threshold, unsigned int *temperature)
{
    return threshold == 1 ? look_narrow(device, "slowdown_temperature", 89, temperature) : NOT_SUPPORTED;
}

int nvmlDeviceGetPowerUsage(Device *device, unsigned int *milliwatts)
{
    return look_narrow(device, "power", 512345, milliwatts);
}

int nvmlDeviceGetEnforcedPowerLimit(Device *device, unsigned int *milliwatts)
{
    return look_narrow(device, "cap", 700000, milliwatts);
}

int nvmlDeviceGetPowerManagementDefaultLimit(Device *device, unsigned int *milliwatts)
{
    return look_narrow(device, "default_cap", 700000, milliwatts);
}

int nvmlDeviceGetTotalEnergyConsumption(Device *device, unsigned long long *millijoules)
{
    return look(device, "energy", 123456789, millijoules);
}

int nvmlDeviceGetClockInfo(Device *device, unsigned int clock, unsigned int *mhz)
{
    if (clock != 1 && clock != 2)
        return INVALID_ARGUMENT;
    return clock == 1 ? look_narrow(device, "sm_mhz", 1755, mhz) : look_narrow(device, "memory_mhz", 2619, mhz);
}

int nvmlDeviceGetMaxClockInfo(Device *device, unsigned int clock, unsigned int *mhz)
{
    if (clock != 1 && clock != 2)
        return INVALID_ARGUMENT;
    return clock == 1 ? look_narrow(device, "sm_most", 1980, mhz) : look_narrow(device, "memory_most", 2619, mhz);
}

int nvmlDeviceGetNvLinkState(Device *device, unsigned int link, unsigned int *up)
{
    char key[16];
    unsigned int links;
    int code = look_narrow(device, "links", 18, &links);
    if (code)
        return code;
    if (link >= links)
        return INVALID_ARGUMENT;
    snprintf(key, sizeof key, "link%u", link);
    return look_narrow(device, key, 1, up);
}

int nvmlDeviceGetCurrPcieLinkGeneration(Device *device, unsigned int *generation)
{
    return look_narrow(device, "pcie_generation", 5, generation);
}

int nvmlDeviceGetMaxPcieLinkGeneration(Device *device, unsigned int *generation)
{
    return look_narrow(device, "pcie_generation_most", 5, generation);
}

int nvmlDeviceGetCurrPcieLinkWidth(Device *device, unsigned int *width)
{
    return look_narrow(device, "pcie_width", 16, width);
}

int nvmlDeviceGetMaxPcieLinkWidth(Device *device, unsigned int *width)
{
    return look_narrow(device, "pcie_width_most", 16, width);
}

typedef struct {
    unsigned int gpu, memory; /* per cent */
} Utilization;

int nvmlDeviceGetUtilizationRates(Device *device, Utilization *use)
{
    use->memory = 61;
    return look_narrow(device, "utilisation", 93, &use->gpu);
}

typedef struct {
    unsigned long long total, free, used; /* bytes */
} Memory;

int nvmlDeviceGetMemoryInfo(Device *device, Memory *memory)
{
    memory->total = 85520809984ull;
    int code = look(device, "memory_used", 64424509440ull, &memory->used);
    memory->free = memory->total - memory->used;
    return code;
}
