"""Every prompt, as pure functions of text; the tokenizer only renders and encodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from ka2l.section import Section

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTRUCTION = "Answer the following question as briefly as possible."

#: Worked examples of the short-answer form (general knowledge; they carry style, not facts of any pool).
EXAMPLES: tuple[tuple[str, str], ...] = (
    ("What is the capital of France?", "Paris"),
    ("Who wrote the play Hamlet?", "William Shakespeare"),
    ("How many legs does a spider have?", "Eight"),
    ("Which planet is known as the Red Planet?", "Mars"),
    ("What gas do plants take in for photosynthesis?", "Carbon dioxide"),
)


class PromptConfig(Section):
    """How a question is put to the model. The probe, the sampler and the tuning all use the same prompt."""

    template: Literal["auto", "plain", "chat"] = "auto"
    """``chat`` renders the tokenizer's chat template; ``auto`` does so where the tokenizer has one."""
    instruction: str = INSTRUCTION
    """First line of the prompt; empty for none."""
    num_shots: int = 5
    """Worked examples before the question, 0 to 5."""

    LOGISTICS: ClassVar[frozenset[str]] = frozenset()


def question_block(question: str) -> str:
    """``Question: ...`` and ``Answer:`` on two lines; the answer follows after one space."""
    return f"Question: {question}\nAnswer:"


def plain_prompt(question: str, instruction: str = "", examples: Sequence[tuple[str, str]] = ()) -> str:
    """The few-shot prompt of KA2L (arXiv 2603.17566) for models without a chat template."""
    blocks = [instruction] if instruction else []
    blocks += [f"{question_block(asked)} {answer}" for asked, answer in examples]
    return "\n\n".join([*blocks, question_block(question)])


def chat_messages(
    question: str, instruction: str = "", examples: Sequence[tuple[str, str]] = ()
) -> list[dict[str, str]]:
    """The same prompt as a conversation. The instruction rides in the first user turn: not every template has a
    system role (Gemma 2 refuses one)."""
    messages: list[dict[str, str]] = []
    for asked, answer in [*examples, (question, "")]:
        lead = f"{instruction}\n\n" if instruction and not messages else ""
        messages.append({"role": "user", "content": f"{lead}Question: {asked}"})
        if answer:
            messages.append({"role": "assistant", "content": answer})
    return messages


class Prompter:
    """Renders and encodes questions for one model."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PromptConfig) -> None:
        self.tokenizer = tokenizer
        self.instruction = config.instruction
        self.examples = EXAMPLES[: config.num_shots]
        self.is_chat = config.template == "chat" or (config.template == "auto" and bool(tokenizer.chat_template))

    def text(self, question: str) -> str:
        """The whole prompt as text, up to where the answer begins."""
        if not self.is_chat:
            return plain_prompt(question, self.instruction, self.examples)
        messages = chat_messages(question, self.instruction, self.examples)
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def token_ids(self, question: str) -> list[int]:
        """The prompt's tokens. A rendered chat prompt already holds its special tokens, so none are added there."""
        return self.encode(self.text(question))

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt's text, or of its beginning."""
        return list(self.tokenizer(text, add_special_tokens=not self.is_chat)["input_ids"])


def encode_messages(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Tokens of a conversation up to where the next answer begins: by the chat template, else as plain text."""
    if not tokenizer.chat_template:
        text = "\n\n".join(message["content"] for message in messages)
        return list(tokenizer(text)["input_ids"])
    turns = [dict(message) for message in messages]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


# --- for a teacher ---------------------------------------------------------------------------------------------------

TEACHER_INSTRUCTION = (
    "Answer the question below as briefly as possible: a name, a number, a date or a short phrase, never a sentence. "
    "Give the answer you would prefer first, then other wordings of the same answer that a grader should accept, if "
    "there are any. Never list different answers."
)
ABSTAIN_INSTRUCTION = (
    "If you do not know the answer, or the question has no single short answer, set abstain to true and give no "
    "answers. Otherwise set abstain to false."
)
ALWAYS_ANSWER_INSTRUCTION = "Always answer: set abstain to false."


def teacher_messages(question: str, allow_abstain: bool = True) -> list[dict[str, str]]:
    """Asks a teacher for the short answers of a question, as a conversation of one user turn (not every model takes a
    system role)."""
    rule = ABSTAIN_INSTRUCTION if allow_abstain else ALWAYS_ANSWER_INSTRUCTION
    return [{"role": "user", "content": f"{TEACHER_INSTRUCTION} {rule}\n\nQuestion: {question}"}]


# --- for KnowTuning's writer -----------------------------------------------------------------------------------------


def _turn(instruction: str, **parts: str) -> list[dict[str, str]]:
    said = [f"{name.replace('_', ' ').capitalize()}: {text}" for name, text in parts.items()]
    return [{"role": "user", "content": "\n\n".join([instruction, *said])}]


def _listed(facts: Sequence[str]) -> str:
    return "\n" + "\n".join(f"{number}. {fact}" for number, fact in enumerate(facts, start=1))


def extract_messages(question: str, answer: str) -> list[dict[str, str]]:
    """Asks for the atomic facts of an answer."""
    return _turn(
        "Break the answer below down into independent atomic facts: short sentences that each state one thing, name "
        "what they are about instead of using a pronoun, and add nothing that the answer does not say. Keep their "
        "order.",
        question=question,
        answer=answer,
    )


def rewrite_messages(question: str, facts: Sequence[str]) -> list[dict[str, str]]:
    """Asks for a question that the facts answer, and for its answer."""
    return _turn(
        "Rewrite the question below into one that asks for exactly the facts below and mentions none of them, and "
        "answer it with these facts and no others.",
        question=question,
        facts=_listed(facts),
    )


def revise_messages(question: str, facts: Sequence[str]) -> list[dict[str, str]]:
    """Asks for wrong facts in place of right ones."""
    return _turn(
        "Revise each of the facts below into a wrong one that sounds as plausible: change what it states and keep its "
        "form. Give as many facts as there are, in their order. They will be used as examples of wrong answers.",
        question=question,
        facts=_listed(facts),
    )


def rephrase_messages(question: str, facts: Sequence[str]) -> list[dict[str, str]]:
    """Asks for one answer made of facts."""
    return _turn(
        "Write the facts below as one fluent answer to the question. State every fact, right or wrong, keep their "
        "order, and add no others.",
        question=question,
        facts=_listed(facts),
    )


# --- for a judge of answers ------------------------------------------------------------------------------------------


def stated_facts_messages(question: str, answer: str) -> list[dict[str, str]]:
    """Asks for the atomic facts of an answer that may state none."""
    (turn,) = extract_messages(question, answer)
    return [turn | {"content": turn["content"] + "\n\nAn answer that states nothing has an empty list of facts."}]


def match_messages(question: str, facts: Sequence[str], reference: Sequence[str]) -> list[dict[str, str]]:
    """Asks which facts of a reference an answer's facts state."""
    return _turn(
        "The facts of an answer to the question are to be checked against the facts of a reference. For each fact of "
        "the answer, in their order, give the number of the reference's fact that states the same, or 0 if there is "
        "none: another wording is fine; another person, place, number or date is not. Go by the reference alone, "
        "whatever you know yourself.",
        question=question,
        facts_of_the_answer=_listed(facts),
        facts_of_the_reference=_listed(reference),
    )


def compare_messages(question: str, reference: str, first: str, second: str) -> list[dict[str, str]]:
    """Asks which of two answers is better in each of three aspects."""
    return _turn(
        "Two answers to the question are given, and a reference, which is right. Judge three aspects, each by itself. "
        "Completeness: which answer states more of what the reference states? Factuality: of which answer's statements "
        "is a larger share right? Logicality: which answer is told in the clearer order, with nothing contradicting "
        "or repeating itself? Reply with first, second or tie for each. Length and order of the answers do not count.",
        question=question,
        reference=reference,
        first_answer=first,
        second_answer=second,
    )


def json_instruction(schema: str) -> str:
    """What follows a prompt where an endpoint cannot be held to a JSON schema.

    Args:
        schema: the schema as JSON.
    """
    return f"Reply with one JSON object and nothing else: no explanation, no code fence. Its JSON schema:\n{schema}"
