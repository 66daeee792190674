"""What a weight takes in each precision."""

#: Bytes of one weight; int8 and int4 with one float32 scale for each block of 128.
WEIGHT_BYTES = {"fp32": 4.0, "fp16": 2.0, "int8": 1 + 4 / 128, "int4": 0.5 + 4 / 128}
