"""``Explainer``: a model, a prompt and an answer in, an ``Explanation`` out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

from torch import Tensor

from .answers import Answers, contrasted
from .arguments import (
    check_one_of,
    checked_batch_size,
    checked_budget,
    checked_factor,
    checked_indices,
    checked_similarity,
    checked_steps,
)
from .asked import Asked, Reading, check_attention, check_method, checked_question
from .attention import BACKENDS, MODES
from .controls import Control, plain_control
from .documents import filled, located
from .engine import Settings, undisturbed
from .explanation import Explanation, LeftOut
from .granularity import (
    Granularity,
    ImageGranularity,
    Images,
    Tiles,
    described,
)
from .methods import (
    DEFAULT_STEPS,
    GRADIENT_METHODS,
    METHODS,
    Method,
    Outcome,
    measure,
    with_neighbours,
)
from .parts import TargetGranularity
from .perturbations import Attention
from .presets import PRESETS
from .progress import token_progress
from .provenance import provenance
from .reduction import Postprocessing, Quantity, Reduction
from .steer import under_controls
from .suppression import Rule
from .tasks import Prompt, task_of
from .tokens import Span
from .units import Layout, lay_out, token_places


class Measured(NamedTuple):
    """What a method gave.

    Args:
        outcome: The units and their scores.
        base_logprobs: ``[M]`` float32, nats: nothing suppressed.
        facts: How the numbers came about, as JSON values; ``method`` among them.
    """

    outcome: Outcome
    base_logprobs: Tensor
    facts: dict[str, Any]


class Explainer:
    """Explains what in a prompt made a model give an answer, by suppressing one unit at a time.

    The model itself is left as it is: its attention, its training mode and its weights are the
    same after an explanation as before, also after an error or Ctrl-C.

    In mode ``multiplicative``, ``provenance["negative_scores"]`` is the share of attention scores
    that are negative with nothing suppressed: multiplying those by a factor below 1 raises them.

    Args:
        model: A transformers model that writes text (a decoder alone, or an encoder-decoder such as
            T5, BART, Whisper or BLIP) or classifies, on any device, in any dtype.
        tokenizer: Its tokenizer, or its processor where prompts are more than text; None if prompts
            and targets are token ids.
        preset: ``default`` (``min_shift``, factor 0.1, ``direct``), ``paper`` (``multiplicative``,
            factor 0.1, ``exact``), ``released`` (the authors' released code: ``min_shift``,
            factor 0.1, ``exact``, similarity 0.6, squared scores) or ``aleph_alpha`` (their later
            product: ``log_additive``, factor 0.1, ``exact``, about 30 units).
        factor: What a suppressed token's attention scores are manipulated with, in ``[0, 1)``; the
            paper's suppression factor is 1 - factor. None is the preset's.
        mode: How: ``multiplicative``, ``min_shift``, ``log_additive`` or ``min_shift_full``
            (see ``atman_triton.attention``). None is the preset's.
        similarity: κ, in ``(0, 1]``: tokens whose input embeddings have a cosine of at least κ with
            one of a unit's are suppressed along with it (``Unit.neighbours`` names them), because
            where something is said twice, suppressing one mention changes little. True is the
            preset's κ: 0.7 in ``paper``, else 0.6. False suppresses units alone, and so does None
            but in the preset ``released``.
        rule: What the tokens outside of a unit are suppressed with, S being their similarity:

            - ``released`` (None, but in ``paper``): from κ on with 1 - (1 - factor) · S, and others
              not at all.
            - ``paper``: the formula of the paper's first version to the letter, which surprises.
              From κ on they get 1 - S, and all others get 1 - κ: what is unlike the unit is
              suppressed too. ``factor`` plays no part. A unit of one token is itself left alone;
              tokens of a larger one get what they would outside of it.
        method: Which perturbations are run, and what a score is. None is the preset's, but
            ``exact`` where the model or the mode has no direct effects:
            ``provenance["method_choice"]`` says which and why.

            - ``exact``: every unit is suppressed in every row of every layer. The score is its
              *total* effect (the paper's), what other tokens took over from it included. One run
              per unit, each from the unit on.
            - ``direct``: every unit is suppressed only in the rows that predict the target; the
              prompt's own representations stay those of the unperturbed run. The score is the
              unit's *direct* effect: another quantity than the total one, without what reached the
              answer through other tokens. Every unit costs the target's tokens instead of a run.
            - ``hybrid``: direct effects first, then total ones for the units that stand highest;
              the others keep their direct effect, and ``Unit.effect`` says which is which.
            - ``hierarchical``: for long documents. Pieces (paragraphs, then the sentences of the
              best; chunks where there is no text) are ranked by their direct effects, and the
              tokens of the best get total effects, until the budget is spent. The others stay
              pieces, with their direct effect, or the total one if runs are left: units of the
              result differ in size and effect, and say so. ``Explanation.coarse`` is where it
              started. A model without direct effects ranks by total ones, within the budget.
            - ``path``: all units are suppressed together, little by little, and every unit gets its
              share of what that does: the gradient to its factor, integrated from 1 to ``factor``
              by the midpoint rule in ``steps`` parts, which are short where the loss bends (up to
              32 forward passes look where that is). ``Explanation.completeness`` holds the sum of
              the scores beside the rise of the loss that it must equal. The cost does not depend
              on the number of units: a forward and a backward pass per step and target token.
              Memory is held by running every layer again in the backward pass. The mode
              ``log_additive`` is a poor choice: suppressing all keys alike changes nothing there.
            - ``score_gradient``: the first-order estimate, the gradient with nothing suppressed
              times ``factor`` - 1. It costs one step of ``path`` and is usually poor: where the
              model is certain, gradients vanish.
        budget: The most exact runs of ``hybrid`` (None: a fifth) and ``hierarchical`` (None: a
            quarter): a float is a share of the runs that ``exact`` would need, an int a count. The
            base run and direct effects do not count.
        steps: Of ``path``, the number of parts (None: 8). More bring the completeness error down.
        layers: Suppress in these layers only; None is all.
        heads: Suppress in these query heads only; None is all.
        batch_size: Perturbations per forward pass. ``"auto"`` takes what memory holds and halves
            it when that was too much.
        progress: Show a progress bar on stderr, if that is a terminal.
        backend: ``auto``, ``triton``, ``hopper``, ``torch`` or ``reference`` (see
            ``atman_triton.attention``).
        attention: Of a model with an encoder and a decoder, where the prompt is suppressed: in the
            ``encoder``'s self-attention, in ``cross``-attention, by which the decoder reads it, or
            in ``both`` (None). The method ``direct`` is about cross-attention whatever is given,
            and is not to be had with ``encoder``. ``provenance["attention"]`` says what was done.
    Raises:
        TypeError: if ``model`` is no transformers model, or a setting is not of the type above.
        UnsupportedModelError: if it is of no kind that can be explained, or its attention cannot be
            manipulated; some models only tell in ``explain``.
        ValueError: if a setting is unknown or out of range.
    Source: AtMan, Eq. 2 to 4.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        preset: str = "default",
        factor: float | None = None,
        mode: str | None = None,
        similarity: float | bool | None = None,
        rule: Rule | None = None,
        method: Method | None = None,
        budget: float | int | None = None,
        steps: int | None = None,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        batch_size: int | Literal["auto"] = "auto",
        progress: bool = True,
        backend: str = "auto",
        attention: Attention | None = None,
    ) -> None:
        self.task = task_of(model, tokenizer)
        check_one_of("preset", preset, tuple(PRESETS))
        chosen = PRESETS[preset]
        mode = chosen.mode if mode is None else mode
        check_one_of("mode", mode, MODES)
        self._default_method = method is None
        if method is None:
            method = "exact" if mode == "min_shift_full" else chosen.method
        check_one_of("method", method, METHODS)
        check_one_of("backend", backend, BACKENDS)
        check_method(mode, method)
        check_attention(self.task, attention, method, default=self._default_method)
        self.model = model
        self.tokenizer = self.task.tokenizer
        self.preset = preset
        self.method: Method = method
        self.budget = checked_budget(method, budget)
        self.steps = checked_steps(method, steps)
        self.progress = progress
        threshold, rule = checked_similarity(similarity, rule, factor, method, chosen)
        self.settings = Settings(
            factor=checked_factor(chosen.factor if factor is None else factor),
            mode=mode,
            layers=checked_indices("layers", layers, self.task.layers),
            heads=checked_indices("heads", heads, range(self.task.heads)),
            backend=backend,
            batch_size=checked_batch_size(batch_size),
            gradients=method in GRADIENT_METHODS,
            similarity=threshold,
            rule=rule,
            attention=attention,
        )

    def explain(
        self,
        prompt: Any,
        target: Any = None,
        granularity: Granularity | Tiles | Sequence[Span] | str | None = None,
        *,
        targets: Sequence[Any] | None = None,
        contrast_target: Any = None,
        target_granularity: TargetGranularity = "complete",
        target_span: str | Span | None = None,
        documents: Sequence[str | Mapping[str, str]] | None = None,
        explain_only: (
            str | Span | Images | Sequence[int] | Sequence[str | Span | Images] | None
        ) = None,
        image_granularity: ImageGranularity | str | None = None,
        max_units: int | None = None,
        score: Quantity | None = None,
        controls: Sequence[Control] | None = None,
        reduction: Reduction = "mean",
        postprocessing: Postprocessing | None = None,
        normalize: bool = False,
        separator: str | None = None,
        max_new_tokens: int | None = None,
        **generation_kwargs: Any,
    ) -> Explanation:
        """Which units of the prompt (and of the target so far) supported each target token.

        The target is tokenised apart from the prompt, without special tokens, and goes behind it:
        the prompt's token ids never depend on the target. They are what the tokenizer makes of the
        prompt, but for a closing token that some put behind every text. Special tokens and what a
        chat template writes around the messages are no units; ``left_out`` lists them. The decoder
        of an encoder-decoder reads the target apart, behind its own start tokens; there the prompt
        keeps its closing token, and the target is tokenised as labels are, without theirs.

        Args:
            prompt: str | chat messages (``[{"role": ..., "content": ...}, ...]``) | token ids
                | an encoding such as ``tokenizer(text)`` returns. For a vision-language model, also
                a ``PIL.Image``, ``[image, "text", ...]`` in any order with any number of images,
                and chat messages with ``{"type": "image", "image": image}`` among their parts. For
                BLIP, an image or ``[image, "text"]``: a question, or how the caption begins. For
                Whisper, samples (1-D, at the rate that its processor wants) or
                ``{"array": samples, "sampling_rate": rate}``.
            target: The answer to explain: str | token ids. None lets the model generate one
                (greedily, unless ``generation_kwargs`` say otherwise) and explains it without its
                end-of-text token. Of a classifier, a class by name or index; None is
                the one that it predicts.
            granularity: What one unit is; None is the preset's: ``auto`` in ``aleph_alpha``, else
                ``token``. A unit is made of whole tokens, so it carries whitespace
                as they do, and a token that stands on both sides of a border goes where most of it
                is. No unit reaches over a token that is left out, or out of a message, a document
                or a passage of ``explain_only``.

                - ``token``, ``word``, ``sentence``, ``paragraph``: words and sentences end as
                  Unicode says, in any script, paragraphs at blank lines, or at line ends in a text
                  without any. Punctuation belongs to its word.
                - ``turn``: a chat message; ``document``: one of ``documents``.
                - ``Delimiter("###")``: what ends with a delimiter, a text or regular expression.
                - ``Spans([(start, stop), ...])``, in characters of the prompt (a list alone means
                  the same), or ``TokenSpans``: only these are units.
                - ``auto``: of token, word, sentence and paragraph what gives the number of units
                  of the prompt closest to ``max_units``. Where even paragraphs are more, neighbours
                  are joined until they are not. ``provenance["level"]`` says what was chosen.
            targets: Several answers instead of one, each explained as if it alone followed the
                prompt, for little more than the price of one: answers of one token (class names)
                are read off the same softmax, longer ones go through the model side by side.
                ``scores`` has the rows of all their tokens, one answer after the other, and
                ``Explanation.branch(k)`` is what a call for the k-th alone gives.
            contrast_target: Why the target rather than this one, str | token ids: both are scored
                in one pass, and ``relevance`` is what a unit of the prompt does for the target
                minus what it does for this one. ``Explanation.relevances`` has either by itself.
            target_granularity: What the answer is read in, ``Explanation.parts``: ``complete``,
                ``token``, ``word`` or ``sentence``. The scores are the same.
            target_span: The only passage of one answer to score: as text that occurs in it once,
                or ``(start, stop)`` in its characters, of a str target without the separator. What
                comes before is read (its tokens can be units), what comes after is not run.
                Of a token classifier, the passage of the prompt whose tokens' class is scored.
            documents: Texts that the answer may rest on, each a str or ``{"id": ..., "text": ...}``
                (an id is the document's number if none is given). They are put, with blank lines
                between them, where the prompt (a str, or the content of a message) says
                ``{documents}``; in a prompt without that, each must stand as it is, in this order.
                Only they are explained, unless ``explain_only`` says otherwise, and
                ``Unit.document`` and ``Explanation.sources()`` say what came from which.
            explain_only: The part of the prompt to explain; None is all that the user wrote. A
                passage as text that occurs once, or ``(start, stop)`` in characters of the prompt;
                ``Images()`` or ``Images(0)`` for the pictures; several of these in a list; or a
                list of unit indices, counted as an explanation without this argument counts them.
                ``left_out`` lists the rest.
            image_granularity: What one unit of a picture is, beside a ``granularity`` of the text:
                ``patch`` (None: one image token, as many as the model makes of it), a grid over
                the picture such as ``"6x6"`` or ``Tiles(6, 6)``, or ``image``, the whole of it.
                ``granularity="6x6"`` says the same, with tokens for the text. ``Seconds(0.5)`` or
                ``"0.5s"`` as ``granularity`` divides a sound.
            max_units: About how many units ``auto`` aims at; None is 30.
            score: What is scored: ``logprob`` (None, but of a regression), of classifiers also
                ``logit``; ``output`` of a regression.
            controls: ``TextControl``, ``TokenControl``, ``ImageControl``: what the explained model
                says while they act on the prompt, in every layer and head, with the explainer's
                mode; a target is generated under them too. Characters count in the prompt as it is
                read (the text before ``Explanation.prompt_stop``), tokens with the special ones. A
                unit that is suppressed has its factor times that of the controls.
            reduction: How ``relevance`` goes over target tokens: ``mean`` or ``sum``.
            postprocessing: What is done to every score before: ``none``, ``absolute`` or
                ``square``; None is the preset's. ``scores`` stays as measured.
            normalize: Whether ``relevance`` is then moved and scaled to [0, 1].
            separator: What is put between the prompt and a str target. None is one space where
                two words would otherwise run together (``"A:"`` and ``"23"``) and nothing
                elsewhere: next to whitespace, after an opening bracket or quote, before closing
                punctuation, in scripts written without spaces, after chat messages or a special
                token; token ids are decoded to decide. ``""`` takes the target literally. What
                was used is in ``provenance``.
            max_new_tokens: The most tokens to generate, only without a target. None is 32, or what
                the context window has room for.
            **generation_kwargs: Passed on to ``model.generate``, only without a target.
        Raises:
            TypeError: if an argument is not of the type above.
            ValueError: if prompt or target is empty or does not fit into the context window, or a
                name or index is unknown.
            UnsupportedModelError: if the model's attention cannot be manipulated.
            torch.OutOfMemoryError: if not even one perturbation fits in memory.
        Source: AtMan, Eq. 2 and 3.
        """
        given = {
            "target": target,
            "targets": targets,
            "contrast_target": contrast_target,
            "target_span": target_span,
            "target_granularity": target_granularity,
            "granularity": granularity,
            "image_granularity": image_granularity,
            "max_units": max_units,
            "explain_only": explain_only,
            "documents": documents,
            "score": score,
            "reduction": reduction,
            "postprocessing": postprocessing,
            "normalize": normalize,
            "separator": separator,
            "max_new_tokens": max_new_tokens,
        }
        asked = checked_question(
            self.task, PRESETS[self.preset], self.method, given, generation_kwargs
        )
        whole = filled(prompt, asked.documents)
        read = self.task.read(whole.prompt)
        words = read.words
        if asked.divides_images and not read.pictures:
            raise ValueError(
                f"image_granularity={described(asked.images)!r} is of pictures, but the prompt "
                "holds none."
            )
        placed = located(asked.documents, whole, words)
        sizes = [(picture.width, picture.height) for picture in read.pictures]
        embed = partial(self.task.embeddings, read)
        mode, backend = self.settings.mode, self.settings.backend
        with (
            undisturbed(self.model),
            under_controls(
                self.model,
                controls,
                words,
                mode,
                backend,
                sizes=sizes,
                embed=embed,
                by_source=partial(self.task.by_source, read),
            ) as acting,
        ):
            if asked.targets is None:
                answers = self.task.generated(
                    read, max_new_tokens, generation_kwargs, asked.target_span
                )
            else:
                answers = self.task.given(
                    read,
                    asked.targets,
                    separator,
                    alone=targets is None,
                    target_span=asked.target_span,
                )
            if contrast_target is not None:
                span = asked.target_span if self.task.classifies else None
                other = self.task.given(
                    read, [contrast_target], separator, alone=True, target_span=span
                )
                answers = contrasted(answers, other)
            facts = answers.facts | {"controls": [plain_control(one) for one in acting]}
            layout = lay_out(
                words,
                answers.tokens,
                asked.granularity,
                explain_only,
                is_text=self.task.is_text,
                documents=placed,
                context=answers.context,
                max_units=asked.max_units,
                target_granularity=target_granularity,
                image_granularity=asked.images,
                pictures=read.pictures,
                sound=read.sound,
            )
            if asked.granularity == "auto":
                facts |= {"max_units": asked.max_units, "level": described(layout.granularity)}
            found = self._measured(read, answers, layout, asked)
        return self._explanation(
            layout,
            found.outcome,
            found.base_logprobs,
            asked.reading,
            layout.left_out + answers.left_out,
            found.facts | facts,
        )

    def _measured(self, read: Prompt, answers: Answers, layout: Layout, asked: Asked) -> Measured:
        """What the method gives for every unit, while controls act on the model."""
        facts: dict[str, Any] = {"method_choice": "default" if self._default_method else "given"}
        with token_progress("Explaining", self.progress) as bar:
            engine = self.task.measures(
                read,
                answers,
                layout,
                self.settings,
                asked.reading.quantity,
                bar.expect,
                bar.advance,
            )
            method = self.method
            if self._default_method and method == "direct" and not engine.shares_prefix:
                method = "exact"
                facts["method_choice"] = (
                    f"default: no direct effects, because {'; '.join(engine.record.reasons)}"
                )
            outcome = measure(
                method,
                engine,
                layout,
                self.budget,
                asked.reading.reduction,
                self.steps or DEFAULT_STEPS,
            )
        if self.settings.similarity is not None:
            places = token_places(read.words, answers.tokens, answers.context)
            outcome = with_neighbours(outcome, engine, places)
            counts = [len(unit.neighbours) for unit in outcome.units]
            facts["mean_neighbours"] = sum(counts) / len(counts)
        if self.settings.mode == "multiplicative":
            share = self.task.negative_share(read, layout, self.settings)
            facts |= {} if share is None else {"negative_scores": share}
        how = provenance(
            self, method, engine.record, described(asked.granularity), len(layout.prompt_ids)
        )
        return Measured(
            outcome, engine.base_logprobs, how | self.task.facts(self.settings, method) | facts
        )

    def _explanation(
        self,
        layout: Layout,
        outcome: Outcome,
        base_logprobs: Tensor,
        reading: Reading,
        left_out: list[LeftOut],
        facts: dict[str, Any],
    ) -> Explanation:
        coarse = None
        if outcome.coarse is not None:
            coarse = self._explanation(
                layout, outcome.coarse, base_logprobs, reading, left_out, facts
            )
        return Explanation(
            text=layout.text,
            prompt_stop=layout.prompt_stop,
            units=outcome.units,
            targets=layout.targets,
            base_logprobs=base_logprobs,
            suppressed_logprobs=outcome.suppressed_logprobs,
            left_out=left_out,
            provenance=facts,
            target_stops=layout.target_stops,
            method=facts["method"],
            coarse=coarse,
            together_logprobs=outcome.together_logprobs,
            **reading._asdict(),
            documents=layout.documents,
            parts=layout.parts,
            pictures=layout.pictures,
            sound=layout.sound,
        )
