"""Made-up repositories of the structure of published releases. Their texts are invented here: those of the releases are
their authors'."""

from __future__ import annotations

from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"

_OPTIONS = """
        if example["problem_type"] == 'multiple choice':
            question = example['problem'] + "Choices:\\n"
            for op in example["options"]:
                question += op + "\\n"
        else:
            question = example['problem']
"""
VIDEO_R1 = f"""
import os
import not_installed_anywhere
from trainer import Qwen2VLGRPOTrainer

raise SystemExit("this must never run")

SYSTEM_PROMPT = ("Nobody sends this. " "It is defined and not used.")


def main(script_args, training_args, model_args):
    reward_funcs = [registry[func] for func in script_args.reward_funcs]
    if script_args.dataset_name.endswith('.json'):
        dataset = load(script_args.dataset_name)
    else:
        dataset = other(script_args.dataset_name)

    def make_conversation(example):
        return {{"prompt": [
            {{"role": "system", "content": SYSTEM_PROMPT}}, {{"role": "user", "content": example["problem"]}}
        ]}}

    QUESTION_TEMPLATE = (
        "  {{Question}}\\n"
        "Ponder it, é la 'carte' or \\"not\\". "
        "Then reply with a {{{{brace}}}} <answer> </answer>."
    )

    TYPE_TEMPLATE = {{
        "multiple choice": " One letter, please.\\n",
        "numerical": " One number, " + "please.",
        "free-form": " Say it \\\\ freely. ",
    }}

    def make_conversation_image(example):
        return {{"prompt": [{{"role": "user", "content": [
            {{"type": "image"}}, {{"type": "text", "text": QUESTION_TEMPLATE.format(Question=example["problem"])}}
        ]}}]}}

    def make_conversation_image_and_video(example):{_OPTIONS}
        msg = {{
            "prompt": [{{
                "role": "user",
                "content": [
                    {{"type": example['data_type']}},
                    {{
                        "type": "text",
                        "text": QUESTION_TEMPLATE.format(Question=question) + TYPE_TEMPLATE[example['problem_type']]}}
                ]
            }}]
        }}
        return msg

    dataset = dataset.map(make_conversation_image_and_video)
"""
VIDEO_R1_EVAL = """
for dataset_name in ['a', 'b']:
    OUTPUT_PATH = f"./results/{dataset_name}_{file_name}.json"
    QUESTION_TEMPLATE = "{Question}\\nMull it over."
    TYPE_TEMPLATE = {"multiple choice": " A letter."}
    messages = []
    for x in data:
        if x["problem_type"] == 'multiple choice':
            question = x['problem'] + "Choices:\\n"
            for op in x["options"]:
                question += op + "\\n"
        else:
            question = x['problem']
        msg = [{
            "role": "user",
            "content": [
                {"type": x['data_type'], x['data_type']: os.getcwd() + x['path'][1:]},
                {"type": "text", "text": QUESTION_TEMPLATE.format(Question=question) + TYPE_TEMPLATE[x['problem_type']]}
            ]
        }]
        messages.append(msg)
"""
TW_GRPO = """
def main(script_args, training_args, model_args):
    if not hasattr(model_args, 'question_type'):
        model_args.question_type = "mixed"
    if model_args.question_type == "single":
        QUESTION_TEMPLATE = "{Question}  One letter."
        print("single")
    elif model_args.question_type == "multiple":
        QUESTION_TEMPLATE = "{Question}  Several letters."
    else:
        QUESTION_TEMPLATE = "{Question}  One or more letters. "

    def make_conversation_video(example):
        return {
            "prompt": [
                {"role": "user", "content": [
                    {"type": "video"},
                    # {"type": "video", "video": example["video"]},
                    {"type": "text", "text": QUESTION_TEMPLATE.format(Question=example["problem"])},
                ]},
            ],
        }
"""
VIDEO_RTS = """
SYSTEM_PROMPT = "Not used."


def main(script_args, training_args, model_args):
    # QUESTION_TEMPLATE = "{Question} an older one"
    QUESTION_TEMPLATE = (
        "Two people talk. "
        "{Question}\\n"
        " A letter is enough."
    )

    def make_conversation_video(example):
        return {
            "prompt": [
                {"role": "user", "content": [
                    {"type": "video"},
                    {"type": "text", "text": QUESTION_TEMPLATE.format(Question=example["problem"])},
                ]},
            ],
        }
"""
VIDEO_HOLMES = """
def predict(llm, question_prompt, video):
    messages = [[
        {"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": question_prompt}]}
    ]]


def evaluate(video_path, json_file_path, output_path, model_name, model_path):
    if model_name == "A":
        model, tokenizer = prepare(model_path)
    for item in tqdm(data):
        if len(output_process) > 0:
            if item["Question ID"] in general_qid_dict.keys():
                continue
        question = item.get('Question')
        options = item.get('Options')
        options = ', '.join([f"{key}: {value}" for key, value in options.items()])
        video = os.path.join(video_path, f"{video_id}.mp4")

        question_prompt = f"Solve it. Asked is: {question}. To choose from: {options}. So:"
        try:
            predict(llm, question_prompt, video)
        except:
            predicted = "none"
"""
MMVU = '''
from string import Template

TEMPERATURE = 1.0
MULTI_CHOICE_COT_PROMPT = Template("""
Q: $question
${optionized_str}

Say why. End with $$LETTER, which costs $$5.""")
OPEN_ENDED_COT_PROMPT = Template("Q: $question. Say why.")
MULTI_CHOICE_DO_PROMPT = Template("Q: $question\\n$optionized_str\\n")
COT_PROMPT = {"multiple-choice": MULTI_CHOICE_COT_PROMPT, "open-ended": OPEN_ENDED_COT_PROMPT}
'''
TEMPCOMPASS = """
answer_prompt = {
    "multi-choice": "\\nThe best one:",
    "yes_no": "\\nYes or no:",
    "captioning": ""    # nothing
}

if __name__ == '__main__':
    args = parser.parse_args()
    question_path = f"{args.data_path}/questions/{args.task_type}.json"
    with open(question_path, 'r') as f:
        input_datas = json.load(f)
    for vid, data in tqdm(input_datas.items()):
        if vid not in predictions:
            predictions[vid] = {}
            for dim, questions in data.items():
                predictions[vid][dim] = []
                for question in questions:
                    inp = question['question'] + answer_prompt[args.task_type]
                    predictions[vid][dim].append({'question': question['question'], 'prediction': ask(inp)})
"""
FILES = {
    "mmvu": {"utils/constant.py": MMVU},
    "tempcompass": {"run_qwen2_vl.py": TEMPCOMPASS},
    "video_r1": {"src/r1-v/src/open_r1/grpo.py": VIDEO_R1, "src/eval_bench.py": VIDEO_R1_EVAL},
    "video_ktr": {
        "src/r1-v/src/open_r1/grpo.py": VIDEO_R1,
        "src/eval_bench.py": VIDEO_R1_EVAL,
        "previous_version/src/r1-v/src/open_r1/grpo.py": VIDEO_R1.replace("Ponder", "Once pondered"),
    },
    "tw_grpo": {"src/open_r1/grpo.py": TW_GRPO},
    "video_rts": {"src/training_files/grpo.py": VIDEO_RTS, "src/r1-v/src/open_r1/grpo.py": VIDEO_R1},
    "video_holmes": {"evaluate.py": VIDEO_HOLMES},
}
"""Release -> path -> source."""


def write_release(folder: Path, name: str) -> Path:
    """A checkout of the made-up repository, at ``COMMIT``."""
    for path, source in FILES[name].items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(source, encoding="utf-8")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    (folder / ".git" / "packed-refs").write_text(f"# pack-refs with: peeled\n{COMMIT} refs/heads/main\n")
    return folder
