// node index.mjs FOLDER PICTURE '<OD>' [fp32|fp16|q8]: what a `--layout transformers.js` export says of a picture.
import { basename, dirname, resolve } from 'node:path';
import { AutoProcessor, Florence2ForConditionalGeneration, RawImage, env } from '@huggingface/transformers';

const [folder, picture, prompt, dtype = 'fp32'] = process.argv.slice(2);
// From disk. From the hub: the model's id as `name`, and none of these three lines.
env.allowRemoteModels = false;
env.useFSCache = false;
env.localModelPath = dirname(resolve(folder));

const name = basename(resolve(folder));
const model = await Florence2ForConditionalGeneration.from_pretrained(name, { dtype });
const processor = await AutoProcessor.from_pretrained(name);
const image = await RawImage.read(picture);
const generated = await model.generate(await processor(image, prompt));
const [text] = processor.batch_decode(generated, { skip_special_tokens: false });
const [task] = prompt.match(/^<\w+>/);
console.log(JSON.stringify(processor.post_process_generation(text, task, image.size)));
