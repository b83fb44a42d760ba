"""The closed questions of the demo checkpoint as a data set of lm-eval. docs/evaluation.md has the commands."""

import sys
from pathlib import Path

from datasets import Dataset, DatasetDict

sys.path.append(str(Path(__file__).parents[2] / "scripts"))

from demo_training.questions import QUESTIONS


def questions(**_: object) -> DatasetDict:
    """Return each question with its answer, which is the first of four choices; the others answer other questions."""
    documents = []
    for place, (question, answer) in enumerate(QUESTIONS.items()):
        following = [*QUESTIONS.values()][place + 1 :] + [*QUESTIONS.values()][:place]
        wrong = [other for other in dict.fromkeys(following) if other != answer]
        documents.append({"question": question, "answer": answer, "choices": [answer, *wrong[:3]]})
    return DatasetDict(test=Dataset.from_list(documents))
