"""Training on annotated answers.

config.py            TuningConfig
sft.py               supervised fine-tuning (TRL, PEFT)
dpo.py               preference comparison (DPO) of better and worse answers
trainer.py           what both share
checkpoints.py       checkpoints within a training, early stopping
knowtuning.py        KnowTuning's training sets
knowledge_writer.py  takes answers apart into facts and writes worse ones
"""
