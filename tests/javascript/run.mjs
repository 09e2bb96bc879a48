// Runs an export folder through @huggingface/transformers; JSON in on stdin, JSON out on stdout, no network.
//   {folder, dtype, wasm, generations: [{pixels, shape, ids, mask, settings}], prompts: [text]}
//     -> {generations: [tokens of each row], prompts: [ids]}
// `pixels` is a file of float32 of that shape, [B, 3, H, W]; `ids` and `mask` are [B, S]; `wasm`: on WebAssembly.
import { readFileSync } from 'node:fs';
import { basename, dirname } from 'node:path';

const { folder, dtype, wasm, generations, prompts } = JSON.parse(readFileSync(0));
if (wasm) {
    // transformers.js takes the runtime that it finds here; in a browser it is this one.
    globalThis[Symbol.for('onnxruntime')] = await import('onnxruntime-web');
}
const { AutoProcessor, Florence2ForConditionalGeneration, Tensor, env } = await import('@huggingface/transformers');
if (wasm) {
    env.useWasmCache = false;
    env.backends.onnx.wasm.wasmPaths = new URL('./node_modules/onnxruntime-web/dist/', import.meta.url).href;
    env.backends.onnx.wasm.numThreads = 1;
}
env.allowRemoteModels = false;
env.useFSCache = false;
env.localModelPath = dirname(folder);

const model = await Florence2ForConditionalGeneration.from_pretrained(basename(folder), {
    dtype,
    device: wasm ? 'auto' : 'cpu',
    session_options: { executionProviders: [wasm ? 'wasm' : 'cpu'], intraOpNumThreads: 1, interOpNumThreads: 1 },
});
const int64 = (rows) => new Tensor('int64', BigInt64Array.from(rows.flat(), BigInt), [rows.length, rows[0].length]);
const numbers = (tensor) => tensor.tolist().map((row) => row.map(Number));

const answers = { generations: [], prompts: [] };
for (const { pixels, shape, ids, mask, settings } of generations) {
    const sequences = await model.generate({
        pixel_values: new Tensor('float32', new Float32Array(new Uint8Array(readFileSync(pixels)).buffer), shape),
        input_ids: int64(ids),
        attention_mask: int64(mask),
        ...settings,
    });
    answers.generations.push(numbers(sequences));
}
const processor = await AutoProcessor.from_pretrained(basename(folder));
for (const text of prompts) {
    const { input_ids } = processor.tokenizer(processor.construct_prompts(text));
    answers.prompts.push(numbers(input_ids)[0]);
}
console.log(JSON.stringify(answers));
