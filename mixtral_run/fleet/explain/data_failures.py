"""Known failures of data, of settings that belong to them, and of training on them."""

from __future__ import annotations

from mixtral_run.fleet.explain.known_failure import KnownFailure

DATA_FAILURES: tuple[KnownFailure, ...] = (
    KnownFailure(
        "data-format",
        "The training data are not in a form that finetune knows",
        r"not jsonl|(training|validation) data cannot be used|is not valid json|expected a json object"
        r"|keyerror: '?(instruction|response|messages|text|prompt)",
        "The keys of an example decide what is learned of it. The error names the examples that fit no shape; "
        "docs/data.md lists the shapes.",
        (
            "mixtral-run data check FILE --load MODEL    # shapes, problems by line, what would be learned",
            'a line of FILE.jsonl: {"instruction": "What is the capital of Australia?", "response": "Canberra."}',
            'or: {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}',
        ),
        (
            "data",
            "jsonl",
            "json",
            "dataset",
            "format",
            "alpaca",
            "sharegpt",
            "csv",
            "parquet",
            "instruction",
            "response",
        ),
    ),
    KnownFailure(
        "data-encoding",
        "The training data are not UTF-8",
        r"data are not utf-8|unicodedecodeerror|codec can't decode byte|invalid start byte|surrogate",
        "The file was saved in another encoding, is compressed, or holds half of a character as \\ud83d.",
        (
            "file FILE    # shows the encoding",
            "iconv -f UTF-16 -t UTF-8 FILE > NEW    # -f: what file showed",
        ),
        ("utf", "encoding", "unicode", "decode", "emoji", "umlaut", "gzip"),
    ),
    KnownFailure(
        "data-empty",
        "There is no example to train on",
        r"data (hold|contain) no (usable )?example|found:? +an empty file|num_samples=0",
        "The file is empty, or nothing of it is learned: a response is missing or every message has weight 0.",
        ("wc -l FILE; head -n 1 FILE",),
        ("data", "empty", "example", "sample"),
    ),
    KnownFailure(
        "data-too-long",
        "Examples are longer than --seq-length",
        r"longer than --seq-length|nothing of the response is left|token indices sequence length is longer",
        "Tokens beyond --seq-length are cut. If the instruction alone is longer, nothing of the response is left.",
        (
            "mixtral-run data check FILE --load MODEL --seq-length 512    # lengths, and the --seq-length to choose",
            "mixtral-run plan --gpus 8 --seq-length 4096    # shows whether longer rows fit",
            "mixtral-run finetune … --seq-length 4096 --pack    # --pack fills rows with other examples",
        ),
        ("truncated", "long", "length", "seq_length", "cut"),
    ),
    KnownFailure(
        "token-ids",
        "The tokenizer has tokens that the model lacks",
        r"tokenizer has tokens that the model lacks|index out of range in self|srcindex < srcselectdimsize"
        r"|indexselect.{0,40}assert|device-side assert",
        "Tokens were added to the tokenizer, but the model's embedding has no rows for them.",
        (
            "give --load the base with the tokenizer that it was trained with",
            "or resize the HF model (resize_token_embeddings), then: mixtral-run convert …",
        ),
        ("tokenizer", "vocabulary", "vocab", "vocab_size", "embedding", "special", "token"),
    ),
    KnownFailure(
        "batch-size",
        "The global batch cannot be split over the processes",
        r"expected a multiple of \d+ \(--micro-batch-size|global batch size.{0,60}not divisible",
        "Every data-parallel replica takes the same number of micro batches. There are processes / TP replicas.",
        ("mixtral-run finetune … --global-batch-size N, a multiple of micro batch size × processes / TP",),
        ("batch", "divisible", "micro_batch_size", "global_batch_size"),
    ),
    KnownFailure(
        "loss-nan",
        "The loss is not a number, or grows",
        r"lm loss: ?(nan|inf)|loss: ?nan|loss is nan|grad norm: ?(nan|inf)|not a finite number",
        "The learning rate is too high, or an example holds something that the model cannot learn from.",
        (
            "mixtral-run finetune … --lr 2e-5 --lr-warmup-iters 20 --clip-grad 1.0",
            "mixtral-run verify --load MODEL --proof    # reads every byte of the base again",
        ),
        ("nan", "inf", "diverges", "loss", "explodes"),
    ),
)
