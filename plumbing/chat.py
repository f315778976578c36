"""The turns of a dialogue as token ids, through the chat template of the model's own tokenizer; and back as text."""

from typing import Any

SLOT = "\x00"  # stands for an answer in the rendered template; what follows it is what the environment adds


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a local folder or of a model on the hub. Raises SystemExit if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise SystemExit(
            f"MODEL={model}: neither a folder with a model nor a model that the hub gives ({reason}); "
            "the toy's model is made by `make data`"
        ) from error


class Chat:
    """Renders prompts and replies. Text is turned into ids here once and never again: what was sampled stays as it is.

    system_turns: whether instructions and verdicts are system turns; if not, they are said by the user, for templates
    that refuse system turns. Raises SystemExit where the template cannot express a dialogue.
    """

    def __init__(self, tokenizer: Any, system_turns: bool = True):
        self.tokenizer = tokenizer
        self.system_turns = system_turns
        self.name = tokenizer.name_or_path
        if not tokenizer.chat_template:
            raise SystemExit(f"{self.name}: its tokenizer has no chat template; take a model that has one")
        answered = self._render([("user", "?"), ("assistant", SLOT)], open_answer=False)
        closing = self.encode(answered.split(SLOT)[1])
        added = tokenizer.get_added_vocab()  # such as <tool_call>; those of the toy worlds are words
        self.special = {*tokenizer.all_special_tokens, *(token for token in added if token[0] in "<[")}
        special = {*tokenizer.all_special_ids, *added.values()}
        # The id with which the policy ends its turn. A base model may have another end id as well (Qwen2.5-Math:
        # <|endoftext|>); sampling that one also ends the attempt, and the environment then closes the turn.
        self.end_of_turn: int = next((token for token in closing if token in special), -1)
        if self.end_of_turn < 0:
            raise SystemExit(f"{self.name}: its chat template ends an answer without a token of its own")
        self._replies: dict[tuple[str, str], list[int]] = {}

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def _render(self, turns: list[tuple[str, str]], open_answer: bool) -> str:
        import jinja2

        messages = [{"role": role, "content": text} for role, text in turns]
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_answer)
        except jinja2.TemplateError as error:
            cure = "; SYSTEM_TURNS=0 does without system turns" if self.system_turns else ""
            raise SystemExit(f"{self.name}: its chat template refuses: {error}{cure}") from error

    def prompt(self, system: str, question: str) -> list[int]:
        """Ids of the instructions, the question and the opening of the first answer."""
        if self.system_turns:
            turns = [("system", system), ("user", question)]
        else:
            turns = [("user", f"{system}\n\n{question}")]
        return self.encode(self._render(turns, open_answer=True))

    def reply(self, role: str, text: str) -> list[int]:
        """Ids from just after an answer's end of turn up to the opening of the next answer."""
        role = role if self.system_turns else "user"
        if (role, text) not in self._replies:
            if len(self._replies) > 1000:  # those that quote something are many
                self._replies.clear()
            rendered = self._render([("user", "?"), ("assistant", SLOT), (role, text)], open_answer=True)
            added = rendered.split(SLOT)[1]
            if text not in added:  # some templates move system turns to the front
                cure = "; SYSTEM_TURNS=0 says it in a user turn" if self.system_turns else ""
                raise SystemExit(f"{self.name}: its chat template drops what is said after an answer{cure}")
            ids = self.encode(added)
            self._replies[role, text] = ids[ids.index(self.end_of_turn) + 1 :]
        return self._replies[role, text]

    def quote(self, text: str, characters: int) -> str:
        """The beginning of a text that is not ours, without tokens that mean something in a template."""
        text = text[:characters].rstrip()
        for token in self.special:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text


def show_dialogue(chat: Chat, dialogue: Any) -> str:
    """A dialogue (rollout.Dialogue) for a terminal: environment dim, actions bright, a verdict after each attempt."""
    dim, bright, green, red, plain = "\033[2m", "\033[1m", "\033[32m", "\033[31m", "\033[0m"
    out, at = "", 0
    for number, attempt in enumerate(dialogue.attempts, 1):
        color = green if attempt.status == "correct" else red
        out += f"{dim}{chat.decode(dialogue.ids[at : attempt.start])}{plain}"
        out += f"{bright}{chat.decode(dialogue.ids[attempt.start : attempt.end])}{plain}"
        out += f" {color}[attempt {number}: {attempt.status}, answer {attempt.answer}, gold "
        out += f"{dialogue.problem.get('answer', 'its tests')}, reward {attempt.reward}]{plain}"
        at = attempt.end
    return out
