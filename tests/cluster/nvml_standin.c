/* A stand-in for NVIDIA's libnvidia-ml.so.1: eight GPUs that behave as scripted, for machines that have none.
 *
 * Structures and numbers are nvml.h's, as nvidia-ml-py passes them. Times count from nvmlInit.
 *
 * All are 90 % busy from NVML_STANDIN_BUSY_S on (0 if not set), gpu7 from the start.
 *
 *   gpu0  healthy, Hopper: 400 W in the mean, 420 W in the moment; every query answered; counts its SMs (GPM), but only
 *         between samples 100 ms apart and more; runs the process NVML_STANDIN_PID; four NVLinks to gpu1
 *   gpu1  old: no power, energy, clocks, throttle reasons, utilization, ECC, events, or PCIe counters
 *   gpu2  lost after NVML_STANDIN_LOST_S seconds (1 if not set)
 *   gpu3  its energy counter wraps at 2^32 mJ, after one second
 *   gpu4  throttled by heat from 0.5 s on: its clock falls to 600 MHz
 *   gpu5  in MIG mode with two instances, the second free (NVML_STANDIN_MIG=0: a whole GPU); utilization is not told
 *         of it
 *   gpu6  XID 79 and an uncorrected ECC error at 0.5 s; one answer in two of its temperature fails
 *   gpu7  another's process with 3 GB is on it from the start; two NVLinks to a switch, as gpu6
 *
 * What else goes wrong is said by numbers of nvmlReturn_t:
 *
 *   NVML_STANDIN_INIT, NVML_STANDIN_COUNT   what nvmlInit and nvmlDeviceGetCount answer
 *   NVML_STANDIN_FAILING=1:4,6:15           gpu1 is forbidden and gpu6 lost when their handles are asked for
 *   NVML_STANDIN_GPM=2,2                    what the first calls for GPM's metrics answer, one after the other
 *   NVML_STANDIN_DRIVER                     the driver's version
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { OK = 0, INVALID = 2, UNSUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7, TIMEOUT = 10, LOST = 15, UNKNOWN = 999 };
enum { DEVICES = 8, MIG_INSTANCES = 2, FREE_MIG = 1 };

typedef struct {
    int index;
    int mig; /* -1: the whole GPU */
} device;

typedef struct {
    unsigned long long total, free, used;
} memory_info;

typedef struct {
    unsigned gpu, memory;
} utilization;

typedef struct {
    char bus_id_legacy[16];
    unsigned domain, bus, device, device_id, subsystem_id;
    char bus_id[32];
} pci_info;

typedef struct {
    unsigned pid;
    unsigned long long memory;
    unsigned gpu_instance, compute_instance;
} process_info;

typedef struct {
    uint32_t field, scope;
    int64_t timestamp, latency_us;
    unsigned type, result;
    unsigned long long value;
} field_value;

typedef struct {
    device *device;
    unsigned long long type, data;
    unsigned gpu_instance, compute_instance;
} event_data;

typedef struct {
    unsigned id, result;
    double value;
    char *names[3];
} gpm_metric;

typedef struct {
    unsigned version, count;
    void *sample1, *sample2;
    gpm_metric metrics[];
} gpm_metrics;

static device whole[DEVICES];
static device instances[MIG_INSTANCES];
static struct timespec began;
static int xid_told;

static double age_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)(now.tv_sec - began.tv_sec) + 1e-9 * (double)(now.tv_nsec - began.tv_nsec);
}

static double given_s(const char *variable, double usual) {
    const char *given = getenv(variable);
    return given ? atof(given) : usual;
}

/* What every question about a device begins with. */
static int there(const device *of) { return of->index == 2 && age_s() > given_s("NVML_STANDIN_LOST_S", 1.0) ? LOST : OK; }

/* Return the answer that a variable such as 1:4,6:15 gives for an index, or OK. */
static int planned(const char *variable, int index) {
    for (const char *at = getenv(variable); at; at = strchr(at, ',')) {
        int of, answer;
        if (*at == ',') at++;
        if (sscanf(at, "%d:%d", &of, &answer) == 2 && of == index) return answer;
    }
    return OK;
}

#define ASK(of)                     \
    do {                            \
        int found = there(of);      \
        if (found != OK) return found; \
    } while (0)

static double watts(const device *of) { return of->index == 4 && age_s() > 0.5 ? 150 : 400; }

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    int answer = (int)given_s("NVML_STANDIN_INIT", OK);
    if (answer != OK) return answer;
    clock_gettime(CLOCK_MONOTONIC, &began);
    xid_told = 0;
    for (int i = 0; i < DEVICES; i++) whole[i] = (device){i, -1};
    for (int i = 0; i < MIG_INSTANCES; i++) instances[i] = (device){5, i};
    return OK;
}

int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

int nvmlShutdown(void) { return OK; }

int nvmlSystemGetDriverVersion(char *version, unsigned length) {
    const char *given = getenv("NVML_STANDIN_DRIVER");
    snprintf(version, length, "%s", given ? given : "575.00-standin");
    return OK;
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    *count = DEVICES;
    return (int)given_s("NVML_STANDIN_COUNT", OK);
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, device **handle) {
    if (index >= DEVICES) return INVALID;
    *handle = &whole[index];
    return planned("NVML_STANDIN_FAILING", (int)index);
}

int nvmlDeviceGetName(device *of, char *name, unsigned length) {
    ASK(of);
    snprintf(name, length, of->mig < 0 ? "Stand-in GPU" : "Stand-in GPU MIG 3g.40gb");
    return OK;
}

int nvmlDeviceGetUUID(device *of, char *uuid, unsigned length) {
    ASK(of);
    if (of->mig < 0)
        snprintf(uuid, length, "GPU-%04d", of->index);
    else
        snprintf(uuid, length, "MIG-%04d", of->mig);
    return OK;
}

int nvmlDeviceGetPciInfo_v3(device *of, pci_info *info) {
    ASK(of);
    memset(info, 0, sizeof *info);
    snprintf(info->bus_id, sizeof info->bus_id, "00000000:%02X:00.0", of->index + 1);
    return OK;
}

int nvmlDeviceGetMemoryInfo(device *of, memory_info *info) {
    ASK(of);
    info->total = of->mig < 0 ? 80000000000ull : 40000000000ull;
    info->used = of->mig < 0 ? 1000000000ull * (unsigned)(of->index + 1) : 500000000ull;
    info->free = info->total - info->used;
    return OK;
}

int nvmlDeviceGetEnforcedPowerLimit(device *of, unsigned *limit_mw) {
    ASK(of);
    if (of->index == 1) return UNSUPPORTED;
    *limit_mw = 700000;
    return OK;
}

int nvmlDeviceGetUtilizationRates(device *of, utilization *rates) {
    ASK(of);
    if (of->index == 1 || of->index == 5) return UNSUPPORTED;
    int idle = of->index != 7 && age_s() < given_s("NVML_STANDIN_BUSY_S", 0.0);
    *rates = idle ? (utilization){0, 0} : (utilization){90, 40};
    return OK;
}

int nvmlDeviceGetPowerUsage(device *of, unsigned *power_mw) {
    ASK(of);
    if (of->index == 1) return UNSUPPORTED;
    *power_mw = (unsigned)(1000 * watts(of));
    return OK;
}

int nvmlDeviceGetTotalEnergyConsumption(device *of, unsigned long long *energy_mj) {
    ASK(of);
    if (of->index == 1) return UNSUPPORTED;
    double used_mj = 1000 * age_s() * 400;
    if (of->index == 4 && age_s() > 0.5) used_mj = 1000 * (0.5 * 400 + (age_s() - 0.5) * 150);
    if (of->index == 3) used_mj += 4294967296.0 - 400000;
    *energy_mj = (unsigned long long)used_mj % 4294967296ull;
    return OK;
}

int nvmlDeviceGetTemperature(device *of, int sensor, unsigned *celsius) {
    static int asked;
    (void)sensor;
    ASK(of);
    if (of->index == 6 && asked++ % 2) return UNKNOWN;
    *celsius = of->index == 4 ? 88 : 60;
    return OK;
}

int nvmlDeviceGetClockInfo(device *of, int clock, unsigned *mhz) {
    ASK(of);
    if (of->index == 1) return UNSUPPORTED;
    if (clock == 2)
        *mhz = 2600;
    else
        *mhz = of->index == 4 && age_s() > 0.5 ? 600 : 1980;
    return OK;
}

int nvmlDeviceGetCurrentClocksThrottleReasons(device *of, unsigned long long *reasons) {
    ASK(of);
    if (of->index == 1) return UNSUPPORTED;
    *reasons = of->index == 4 && age_s() > 0.5 ? 0x40 | 0x08 : 0;
    return OK;
}

int nvmlDeviceGetTotalEccErrors(device *of, int kind, int counter, unsigned long long *errors) {
    (void)counter;
    ASK(of);
    if (of->index == 1) return UNSUPPORTED;
    *errors = of->index == 6 && kind == 1 && age_s() > 0.5;
    return OK;
}

int nvmlDeviceGetComputeRunningProcesses_v3(device *of, unsigned *count, process_info *found) {
    ASK(of);
    const char *own = getenv("NVML_STANDIN_PID");
    unsigned pid = of->index == 7 ? 4242 : of->index == 0 && own ? (unsigned)atoi(own) : 0;
    if (!pid) {
        *count = 0;
        return OK;
    }
    if (!found || *count < 1) {
        *count = 1;
        return TOO_SMALL;
    }
    *count = 1;
    found[0] = (process_info){pid, 3000000000ull, UINT32_MAX, UINT32_MAX};
    return OK;
}

int nvmlDeviceGetFieldValues(device *of, int count, field_value *values) {
    ASK(of);
    for (int i = 0; i < count; i++) {
        int pcie = values[i].field == 197 || values[i].field == 198;
        if (values[i].field == 186) { /* power of the moment, an unsigned int */
            values[i].result = of->index || values[i].scope ? UNSUPPORTED : OK;
            values[i].type = 1;
            values[i].value = 0xdead00000000ull | 420000u;
            continue;
        }
        values[i].type = 3;
        values[i].result = (of->index == 1 && pcie) || (of->index > 1 && !pcie) ? UNSUPPORTED : OK;
        values[i].value = (unsigned long long)(age_s() * (pcie ? 1e9 : 2e6));
    }
    return OK;
}

int nvmlDeviceGetPcieThroughput(device *of, int counter, unsigned *kilobytes_per_s) {
    ASK(of);
    nanosleep(&(struct timespec){0, 20000000}, NULL); /* as long as the driver watches the link */
    *kilobytes_per_s = counter == 0 ? 1000 : 2000;
    return OK;
}

int nvmlDeviceGetTopologyCommonAncestor(device *a, device *b, int *level) {
    ASK(a);
    *level = a->index / 4 == b->index / 4 ? 40 : 50;
    return OK;
}

static int linked(const device *of) { return of->index < 2 ? 4 : of->index > 5 ? 2 : 0; }

int nvmlDeviceGetNvLinkState(device *of, unsigned link, unsigned *active) {
    ASK(of);
    if ((int)link >= linked(of)) return linked(of) ? INVALID : UNSUPPORTED;
    *active = 1;
    return OK;
}

int nvmlDeviceGetNvLinkRemoteDeviceType(device *of, unsigned link, int *type) {
    (void)link;
    ASK(of);
    *type = of->index < 2 ? 0 : 2;
    return OK;
}

int nvmlDeviceGetNvLinkRemotePciInfo_v2(device *of, unsigned link, pci_info *info) {
    (void)link;
    ASK(of);
    return nvmlDeviceGetPciInfo_v3(&whole[1 - of->index], info);
}

int nvmlDeviceGetMigMode(device *of, unsigned *current, unsigned *pending) {
    ASK(of);
    if (of->index < 5) return UNSUPPORTED;
    *current = *pending = of->index == 5 && given_s("NVML_STANDIN_MIG", 1);
    return OK;
}

int nvmlDeviceGetMaxMigDeviceCount(device *of, unsigned *count) {
    ASK(of);
    *count = MIG_INSTANCES + FREE_MIG;
    return OK;
}

int nvmlDeviceGetMigDeviceHandleByIndex(device *of, unsigned index, device **handle) {
    ASK(of);
    if (index >= MIG_INSTANCES) return NOT_FOUND;
    *handle = &instances[index];
    return OK;
}

int nvmlDeviceGetGpuInstanceId(device *of, unsigned *id) {
    ASK(of);
    *id = (unsigned)of->mig + 1;
    return OK;
}

int nvmlDeviceGetComputeInstanceId(device *of, unsigned *id) {
    ASK(of);
    *id = 0;
    return OK;
}

int nvmlEventSetCreate(void **set) {
    *set = &xid_told;
    return OK;
}

int nvmlDeviceRegisterEvents(device *of, unsigned long long types, void *set) {
    (void)types;
    (void)set;
    ASK(of);
    return of->index == 1 ? UNSUPPORTED : OK;
}

int nvmlEventSetWait_v2(void *set, event_data *data, unsigned timeout_ms) {
    (void)set;
    (void)timeout_ms;
    if (age_s() < 0.5 || xid_told) return TIMEOUT;
    xid_told = 1;
    *data = (event_data){&whole[6], 8, 79, UINT32_MAX, UINT32_MAX};
    return OK;
}

int nvmlGpmQueryDeviceSupport(device *of, unsigned *support) {
    ASK(of);
    support[1] = of->index == 0;
    return OK;
}

int nvmlGpmSampleAlloc(void **sample) {
    *sample = malloc(sizeof(double));
    return OK;
}

int nvmlGpmSampleGet(device *of, void *sample) {
    ASK(of);
    *(double *)sample = age_s();
    return OK;
}

int nvmlGpmMetricsGet(gpm_metrics *asked) {
    static const char *planned_answers;
    static int called;
    if (!called++) planned_answers = getenv("NVML_STANDIN_GPM");
    if (planned_answers) {
        int answer = atoi(planned_answers);
        planned_answers = strchr(planned_answers, ',');
        if (planned_answers) planned_answers++;
        return answer;
    }
    if (*(double *)asked->sample2 - *(double *)asked->sample1 < 0.1) return INVALID;
    for (unsigned i = 0; i < asked->count; i++) {
        asked->metrics[i].result = OK;
        asked->metrics[i].value = 10.0 * asked->metrics[i].id;
    }
    return OK;
}
