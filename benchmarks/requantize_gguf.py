"""One GGUF file in another of llama.cpp's types, every matrix of it: for peers of equal size.

    python benchmarks/requantize_gguf.py IN.gguf TYPE OUT.gguf      TYPE: F16, Q8_0, Q5_0, Q4_0, ...

The types are those that the gguf library can write; K-quants are not among them.
"""

import sys

import gguf
import numpy as np
from gguf.quants import dequantize, quantize


def requantize(source: str, kind: str, out: str) -> None:
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    wanted = gguf.GGMLQuantizationType[kind]
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.ndim < 2:
            writer.add_tensor(tensor.name, values)
        else:
            writer.add_tensor(tensor.name, quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    requantize(*sys.argv[1:])
