def load_tokenizer(model: str) -> Any:
    """The tokenizer of a folder or of a model of the hub. Raises SystemExit if there is none."""
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        why = str(error).strip().split("\n")[0]
        cure = "; `make data` makes the toy's" if model == "data/toy/warm_start" else ""
        raise SystemExit(f"MODEL={model}: no folder with a model, and none that the hub gives ({why}){cure}") from error


class Chat:
    """Turns of a dialogue as token ids, through the chat template of the model's own tokenizer.

    Raises SystemExit where the template cannot say what a dialogue needs.
    """

    MARK = "\x00"  # stands for an answer in the rendered template: what follows it is what the environment adds

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        if not tokenizer.chat_template:
            raise SystemExit(f"{tokenizer.name_or_path}: its tokenizer has no chat template; take a model that has one")
        closing = self._encode(self._render("?").split(self.MARK)[1])
        special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        # The id by which the policy says "my turn is over". A base model may know another end id as well (Qwen2.5-Math:
        # <|endoftext|>); sampling that one ends the attempt too, and the environment then closes the turn.
        self.end_of_turn: int | None = next((token for token in closing if token in special), None)
        if self.end_of_turn is None:
            raise SystemExit(f"{tokenizer.name_or_path}: its chat template ends an answer without a token of its own")
        self._feedback: dict[tuple[tuple[str, str], ...], list[int]] = {}  # what is said -> its ids
        if MAX_ATTEMPTS > 1:
            self.feedback("?", 1)  # a template that cannot say it is found out now, not behind the first wrong answer

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _render(self, question: str, system: str = "", *after: tuple[str, str], answered: bool = True) -> str:
        """The template's text: system, question, the answer's mark, what is said after it, the next answer's opening.
        Without system turns the instructions stand before the question, and a verdict is the user's."""
        system_turn = [("system", system)] if system and SYSTEM_TURNS else []
        question = f"{system}\n\n{question}" if system and not SYSTEM_TURNS else question
        turns = [*system_turn, ("user", question), *[("assistant", self.MARK)] * answered]
        if SYSTEM_TURNS:
            turns += after
        elif after:
            turns.append(("user", "\n\n".join(text for _, text in after)))
        messages = [{"role": role, "content": text} for role, text in turns]
        opening = bool(after) or not answered
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opening)
        except jinja2.TemplateError as error:
            cure = "; SYSTEM_TURNS=0 makes do without system turns" if SYSTEM_TURNS else ""
            raise SystemExit(f"{self.tokenizer.name_or_path}: its chat template refuses: {error}{cure}") from error

    def prompt(self, question: str, attempts: int) -> list[int]:
        """Ids of the system turn, the question and the opening of the first answer."""
        system = {"multi_attempt": SAY_MULTI_REPEAT if REPEAT_QUESTION else SAY_MULTI, "single_turn": SAY_SINGLE}
        text = system[PROMPT].replace("{attempts}", str(attempts))
        return self._encode(self._render(question, text, answered=False))

    def feedback(self, question: str, attempts_left: int) -> list[int]:
        """Ids from right behind the end of an answer's turn to the opening of the next answer."""
        words = (SAY_WRONG_REPEAT if REPEAT_QUESTION else SAY_WRONG).replace("{attempts}", str(attempts_left))
        said = (("user", SAY_CHECK) if FEEDBACK == "intrinsic" else ("system", words),)
        said += (("user", question),) * REPEAT_QUESTION
        if said not in self._feedback:
            text = self._render("?", "", *said).split(self.MARK)[1]
            if said[0][1] not in text:  # some templates move system turns to the front
                raise SystemExit(
                    f"{self.tokenizer.name_or_path}: its chat template drops what is said behind an answer"
                    + "; SYSTEM_TURNS=0 says it in a user turn" * SYSTEM_TURNS
                )
            ids = self._encode(text)
            self._feedback[said] = ids[ids.index(self.end_of_turn) + 1 :]
        return self._feedback[said]
