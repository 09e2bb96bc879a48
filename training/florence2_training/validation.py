"""How good a model that is being trained is: its loss, and the scores of its answers, on the validation data."""

from itertools import islice

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from florence2_data.parsing import parse_answer
from florence2_evaluation.prediction import Prediction
from florence2_evaluation.question import Question, questions
from florence2_evaluation.score import score
from florence2_evaluation.torch_model import TorchModel
from florence2_export.checkpoint import Checkpoint

from florence2.prompts import parse
from florence2_training.corpus import Corpus
from florence2_training.loop import loader
from florence2_training.objective import Batches, Florence2Learner
from florence2_training.recipe import Recipe
from florence2_training.sampler import Batch


class Judge:
    """Validation: the loss, and where more is asked for the scores of free-running answers."""

    def __init__(
        self,
        recipe: Recipe,
        checkpoint: Checkpoint,
        batches: Batches,
        learner: Florence2Learner,
        accelerator: Accelerator,
    ) -> None:
        """`batches`: of the validation data alone."""
        self.recipe, self.checkpoint, self.batches = recipe, checkpoint, batches
        (self.corpus,) = batches.corpora
        self.learner, self.accelerator = learner, accelerator
        self._higher: dict[str, bool] = {"loss": False}

    def scores(self) -> dict[str, float]:
        self.checkpoint.model.eval()
        found = {"loss": self._loss()}
        if self.recipe.metric_for_best_model != "loss":
            found |= self._answers()
        # Every process must come to the same judgement.
        found, self._higher = broadcast_object_list([found, self._higher])
        return found

    def higher_is_better(self, name: str) -> bool:
        return self._higher.get(name, True)

    @torch.no_grad()
    def _loss(self) -> float:
        total = torch.zeros(2, device=self.accelerator.device)
        recipe = self.recipe
        size, count = recipe.per_device_train_batch_size, self.accelerator.num_processes
        own = range(self.accelerator.process_index, len(self.corpus), count)
        order = [Batch(list(own[start : start + size])) for start in range(0, len(own), size)]
        for batch in loader(self.batches, order, recipe.dataloader_num_workers):
            batch = {name: value.to(self.accelerator.device) for name, value in batch.items()}
            with self.accelerator.autocast():
                total += torch.stack([self.learner(batch).float(), batch["weight"]])
        total = self.accelerator.reduce(total, "sum")
        return float(total[0] / total[1])

    def _answers(self) -> dict[str, float]:
        size = self.recipe.per_device_train_batch_size
        model = TorchModel(self.checkpoint, batch_size=size, device=str(self.accelerator.device))
        samples = (self.corpus[index] for index in range(len(self.corpus)))
        # Whole questions: several answers to one are judged together.
        own = islice(questions(samples), self.accelerator.process_index, None, self.accelerator.num_processes)
        predictions = gather_object(list(model.predict(own)))
        if not self.accelerator.is_main_process:
            return {}
        scores = score(predictions)
        self._higher |= {found.name: found.higher_is_better for found in scores}
        return {found.name: found.value for found in scores}


def check_metric(name: str, validation: Corpus) -> None:
    """Raises ValueError, with the metrics there are, for one that not even perfect answers would have."""
    samples = (validation[index] for index in range(len(validation)))
    found = [one.name for one in score(map(_perfect, questions(samples)))]
    if name not in found:
        raise ValueError(
            f"metric_for_best_model {name!r} is not among those that the validation data have: {', '.join(found)}"
        )


def _perfect(question: Question) -> Prediction:
    """The answer that was wanted; of a picture of any size."""
    size, text = (1000, 1000), question.references[0]
    prompt = parse(question.prompt)
    answer = {prompt.key: parse_answer(prompt.task, text, size)}
    return Prediction(str(question.image), size, question.prompt, question.references, text, answer, None)
