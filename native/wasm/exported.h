// Functions that a page calls. Buffers are addresses in the module's memory, at multiples of 4.
#pragma once

#define EXPORT extern "C" __attribute__((visibility("default"), used))
