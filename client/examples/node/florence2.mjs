// Florence-2 on Triton over HTTP, with what Node brings.
import { setTimeout as pause } from 'node:timers/promises';

const TYPES = {
  num_beams: 'INT32',
  max_new_tokens: 'INT32',
  no_repeat_ngram_size: 'INT32',
  length_penalty: 'FP32',
  early_stopping: 'BOOL',
};
const LISTS = ['token_ids', 'token_logprobs'];

/** The server's reason; `status` is HTTP's, or null where there was no answer. */
export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export class Florence2 {
  /** `timeout`: milliseconds for one answer, `retries` among them: of 503 and of connections that fail. */
  constructor(url = 'http://localhost:8000', { model = 'florence2', timeout = 300_000, retries = 7 } = {}) {
    Object.assign(this, { url: `${url}/v2/models/${model}`, timeout, retries });
  }

  /** All outputs by name, and `model_version`. `image`: a Buffer with an image file; `settings`: num_beams and so on.
   * Triton's generate endpoint: plain JSON, the picture in base64. */
  async generate(image, prompt, settings = {}) {
    known(settings);
    const body = JSON.stringify({ image: image.toString('base64'), prompt, ...settings });
    const response = await this.post('generate', body);
    return { ...response, answer: JSON.parse(response.answer) };
  }

  /** The same by KServe's infer endpoint: the picture goes behind the JSON, without base64, and the server is told to
   * give up when we do. All outputs: a response cache keeps those that the first to ask has named. */
  async infer(image, prompt, settings = {}) {
    known(settings);
    const length = Buffer.alloc(4);
    length.writeUInt32LE(image.length);
    const one = { shape: [1, 1] };
    const json = Buffer.from(
      JSON.stringify({
        parameters: { timeout: this.timeout * 1000 },
        inputs: [
          { name: 'image', ...one, datatype: 'BYTES', parameters: { binary_data_size: 4 + image.length } },
          { name: 'prompt', ...one, datatype: 'BYTES', data: [prompt] },
          ...Object.entries(settings).map(([name, value]) => ({ name, ...one, datatype: TYPES[name], data: [value] })),
        ],
      }),
    );
    const headers = { 'Inference-Header-Content-Length': json.length };
    const { outputs, model_version } = await this.post('infer', Buffer.concat([json, length, image]), headers);
    const values = Object.fromEntries(outputs.map(({ name, data }) => [name, LISTS.includes(name) ? data : data[0]]));
    return { ...values, answer: JSON.parse(values.answer), model_version };
  }

  async post(endpoint, body, headers = {}) {
    const signal = AbortSignal.timeout(this.timeout);
    for (let tries = 0; ; tries++) {
      try {
        return await attempt(`${this.url}/${endpoint}`, { method: 'POST', body, headers, signal });
      } catch (error) {
        if (signal.aborted) throw new Refused(`no answer within ${this.timeout} ms`, null);
        const again = error instanceof Refused && ([503, null].includes(error.status) || error.message.includes('try again later'));
        if (!again || tries === this.retries) throw error;
      }
      // Twice as long every time, and not all clients at once.
      await pause(250 * 2 ** tries * (0.5 + Math.random()), null, { signal }).catch(() => {});
    }
  }
}

function known(settings) {
  // generate takes any key, and passes over those that it doesn't know.
  const wrong = Object.keys(settings).filter((name) => !(name in TYPES));
  if (wrong.length) throw new TypeError(`unknown: ${wrong}; settings are ${Object.keys(TYPES)}`);
}

async function attempt(url, options) {
  let response;
  let text;
  try {
    response = await fetch(url, options);
    text = await response.text();
  } catch (error) {
    throw new Refused(`${url}: ${error.cause?.message ?? error.message}`, null);
  }
  if (response.ok) return JSON.parse(text);
  let reason = text;
  try {
    reason = JSON.parse(text).error;
  } catch {
    // A proxy's page.
  }
  throw new Refused(reason, response.status);
}
