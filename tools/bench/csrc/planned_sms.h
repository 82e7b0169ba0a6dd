// FlashInfer's planner, and with it ETAP's launch behind it, is to believe that the device has PLANNED_SMS SMs. Include it
// before FlashInfer's headers, or force it in (nvcc -include).
#pragma once

#include <cuda_runtime.h>

static inline cudaError_t planned_device_attribute(int* value, cudaDeviceAttr attribute, int device) {
    cudaError_t const error = cudaDeviceGetAttribute(value, attribute, device);
    if (attribute == cudaDevAttrMultiProcessorCount) {
        *value = PLANNED_SMS;
    }
    return error;
}
#define cudaDeviceGetAttribute planned_device_attribute
