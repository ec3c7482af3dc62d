"""The method: values in, values out. It knows neither Ray nor vLLM and reads no environment variable.

records.py            the Arrow schema of every table
errors.py             one exception tree
section.py            base of all config sections
seeds.py              what a row's random numbers derive from
pool.py               rows of a pool: cleaned, quarantined
pool_sources.py       where rows come from: JSONL, Parquet, Hugging Face
pool_splits.py        duplicates and seeded splits
prompts.py            every prompt
models.py             model directories: checks, identity, loading
sampling.py           what is asked of a sampler, and one on plain transformers
adaptive_sampling.py  no more answers than a question's entropy needs
normalise.py          words, numbers and dates of an answer
lexical.py            do two answers have the same ones?
equivalence.py        do two answers mean the same? lexical, NLI, embedding, judge
clustering.py         answers grouped by meaning
grading.py            answers against accepted answers
semantic_entropy.py   clusters to uncertainty
labels.py             dynamic threshold: entropy to known / unknown
hidden_states.py      prefill-only forward to pooled states and certainty of the first answer token
probe.py              classifier on hidden states: layer sweep, calibration
certainty.py          its scores joined with that certainty
probe_training.py     all layers trained at once
calibration.py        scores to probabilities
evidence.py           evidence for unknown, added up over model states and own samples
correctness.py        the second axis: sure and wrong, learnt from annotations
selection.py          query strategies
spread_strategies.py  those that spread over hidden states
candidates.py         what a strategy sees and gives back
decoder.py            hidden-state inversion: state to question
decoder_config.py     its settings
decoder_training.py   fitted on (state, question) pairs; how true it is
decoding.py           variants of unknown states, and the gates of what is decoded from them
annotation.py         who answers: the pool's own answers
reference_table.py    answers to questions that the pool does not hold
annotation_human.py   people: what several of them come to
annotation_files.py   their files: JSONL, CSV, Label Studio
annotation_cells.py   what stands in one cell of them
annotation_teacher.py a teacher: samples that agree
teacher.py            asks an OpenAI-compatible endpoint, many prompts at once
teacher_batch.py      or through its Batch API
teacher_config.py     which teacher, and how
teacher_local.py      or generates on the run's own machines
teacher_request.py    prompts and the journal's keys
teacher_reply.py      what came back, and what is still to be asked
teacher_client.py     one structured reply a prompt, for whoever asks a teacher
teacher_limits.py     cap on money, rate limits, backoff
teacher_faults.py     what an endpoint's errors mean
adapter.py            LoRA and the other kinds on a model: made, loaded, saved, merged
virtual_tokens.py     P-tuning and prefix tuning, as a cache to start from
checkpoints.py        checkpoints within a training, early stopping
tuning_config.py      how an adapter is trained
tuning.py             rows to adapter (TRL, PEFT)
training.py           what all training of the model shares
knowtuning.py         annotated answers to KnowTuning's two training sets
knowledge_writer.py   who takes answers apart and puts them together
perplexity.py         how hard the model finds a fact or a question's wording; log-likelihoods
p_true.py             P(True): is the model's own answer true, by its own word
comparison.py         DPO on better and worse answers
canary.py             proof that an adapter works, in every engine
merging.py            an adapter added to the base model's weights
muon.py               optimiser of matrices that are trained from scratch
metrics.py            exact match, F1, AUROC with CI, forgetting
evaluation.py         what is measured beside accuracy
text_metrics.py       METEOR, ROUGE-L, BERTScore
answer_facts.py       facts right, wrong and missing; which of two answers is better
answer_judge.py       a language model as judge of both
reliability.py        calibration and abstention
testbed.py            a model whose knowledge is known exactly
testbed_world.py      its people and facts
testbed_facts.py      or the facts of a file
testbed_lives.py      or their whole lives, for long answers
testbed_model.py      its tokenizer and training
testbeds/             those of the presets, trained
sizing.py             how much of which GPUs a model needs
"""
