"""Image bytes and prompt -> pixels at the model's size and prompt token ids."""

import numpy as np
from tokenizers import Tokenizer

from florence2.errors import InvalidRequest
from florence2.generation.engine import TIMES
from florence2.images import Limits, Resizer, decode
from florence2.manifest import ModelSettings, read_json
from florence2.prompts import PromptEncoder
from florence2.triton import Metrics, Worker, parameters, version_folder


class TritonPythonModel:
    def initialize(self, args):
        folder = version_folder(args)
        given = parameters(args)
        self.limits = Limits(float(given["max_megapixels"]), float(given["max_megabytes"]))
        self.resizer = Resizer(read_json(folder / "preprocessor_config.json"))
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.prompts = PromptEncoder(tokenizer, ModelSettings.read(folder).sizes)
        self.worker = Worker(self.answer, given, metrics=Metrics(args, TIMES, {}))

    def execute(self, requests):
        for request in requests:
            self.worker.submit(request)

    def answer(self, inputs):
        try:
            input_ids = self.prompts.encode(inputs["prompt"][0].decode())
        except UnicodeDecodeError:
            raise InvalidRequest("the prompt is not UTF-8") from None
        image = decode(inputs["image"][0], self.limits)
        return {"pixels": self.resizer(image), "input_ids": input_ids, "image_size": np.array(image.size)}

    def finalize(self):
        self.worker.stop()
