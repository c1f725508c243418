"""EPTree against a completions server, such as `vllm serve MODEL`: the search is the one that runs on the engine.

python examples/remote_search.py --url http://127.0.0.1:8000/v1 --model MODEL --tokenizer FOLDER "2+2=" "1+1="
"""

import argparse

from eptree import eptree

from ibtpo_engine import BackendEngine, CompletionsServer, HttpBackend, Sampling, load_tokenizer, stop_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", required=True, help="base address of the server, ending in /v1")
    parser.add_argument("--model", required=True, help="the name the server has for its model")
    parser.add_argument("--tokenizer", required=True, help="folder with the model's tokenizer")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("prompts", nargs="+")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer)
    sampling = Sampling(max_tokens=args.max_tokens, stop_tokens=stop_tokens(args.tokenizer, tokenizer))
    search = eptree(deepest=args.max_tokens * 3 // 4)
    with HttpBackend(CompletionsServer(url=args.url, model=args.model)) as server:
        for i, tree in BackendEngine(server).run(search, map(tokenizer.encode, args.prompts), sampling):
            print(f"{args.prompts[i]!r}: {len(tree.leaves())} trajectories, {tree.num_sampled} tokens sampled")


if __name__ == "__main__":
    main()
