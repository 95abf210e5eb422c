// zarrita.js: does a job of compat/readers/__init__.py. It is copied to where node finds zarrita, and run there.
import { readFileSync, writeFileSync, openSync, closeSync } from "node:fs";
import { FileSystemStore } from "@zarrita/storage";
import * as zarr from "zarrita";

const ORDER = new Uint8Array(new Uint16Array([1]).buffer)[0] === 1 ? "<" : ">";
const DTYPES = {
  bool: "|b1", int8: "|i1", uint8: "|u1",
  int16: "i2", int32: "i4", int64: "i8", uint16: "u2", uint32: "u4", uint64: "u8",
  float16: "f2", float32: "f4", float64: "f8",
};

async function read(path) {
  const array = await zarr.open.v3(zarr.root(new FileSystemStore(path)), { kind: "array" });
  const { data, shape, stride } = await zarr.get(array);
  let step = 1;
  for (let axis = shape.length - 1; axis >= 0; axis -= 1) {
    if (stride[axis] !== step) throw new Error(`strides ${stride} of shape ${shape} are not in C order`);
    step *= shape[axis];
  }
  const dtype = DTYPES[array.dtype];
  return {
    bytes: new Uint8Array(data.buffer, data.byteOffset, data.byteLength),
    read: { dtype: dtype.startsWith("|") ? dtype : ORDER + dtype, shape },
  };
}

const job = JSON.parse(readFileSync(process.argv[2], "utf-8"));
const file = openSync(job.bytes, "w");
const reads = [];
for (const path of job.paths) {
  try {
    const { bytes, read: found } = await read(path);
    writeFileSync(file, bytes);
    reads.push(found);
  } catch (error) {
    reads.push({ error: `${error.name}: ${error.message}` });
  }
}
closeSync(file);
const versions = { node: process.versions.node };
for (const name of job.versions) {
  versions[name] = JSON.parse(readFileSync(`node_modules/${name}/package.json`, "utf-8")).version;
}
writeFileSync(job.answer, JSON.stringify({ versions, reads }));
