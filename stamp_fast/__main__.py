from stamp_fast.cli import main

if __name__ == "__main__":
    main(prog_name="stamp-fast")
