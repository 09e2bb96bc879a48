// node ask.mjs PICTURE PROMPT [PROMPT ...]: answers, a line of JSON each. FLORENCE2_URL: default http://localhost:8000
import { readFile } from 'node:fs/promises';
import { Florence2, Refused } from './florence2.mjs';

const [picture, ...prompts] = process.argv.slice(2);
const client = new Florence2(process.env.FLORENCE2_URL);
const image = await readFile(picture);
try {
  // Asked at once, tasks on one picture share its image features.
  for (const { answer } of await Promise.all(prompts.map((prompt) => client.infer(image, prompt)))) {
    console.log(JSON.stringify(answer));
  }
} catch (error) {
  if (!(error instanceof Refused)) throw error;
  console.error(error.message);
  process.exitCode = 1;
}
