//! The command line of `hvdrun`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{ArgAction, CommandFactory, Parser};

use super::horovod;
use super::options::Options;

/// Starts a program as several ranks, on this host or on several, and watches over them.
///
/// It needs no MPI. Each rank finds its place, where to meet the others and the job's secret in its environment. The
/// output of all ranks appears here, each line with its rank; stdin goes to rank 0. When a rank fails, the others get a
/// moment to say what they have to say and are then ended, and hvdrun names the first that failed and why.
#[derive(Debug, Parser)]
#[command(name = "hvdrun", version, override_usage = "hvdrun [OPTIONS] -np N PROGRAM [ARGUMENTS…]", after_long_help = AFTER_HELP)]
pub struct Args {
    /// Where ranks run, how, and their settings.
    #[command(flatten)]
    pub options: Options,

    /// Read options from this YAML file; the command line wins. Keys are the long names with `_`, as in `num_proc: 2`
    #[arg(long, value_name = "FILE")]
    pub config_file: Option<PathBuf>,

    /// Tell what this build can do, and stop
    #[arg(long)]
    pub check_build: bool,

    /// The program and its arguments
    #[arg(trailing_var_arg = true, value_name = "PROGRAM")]
    pub command: Vec<OsString>,
}

const AFTER_HELP: &str = "\
Switches such as --autotune can be turned off with --no-autotune.

Examples:
  hvdrun -np 4 ./train --config demo.yaml              4 ranks on this host
  hvdrun -H node1:4,node2:4 ./train                    8 ranks on two hosts, over ssh
  hvdrun -np 8 --hostfile hosts --output-filename out ./train

On other hosts, hvdrun and the program must be at the same paths as here, and ssh must get there without a password.

Exit codes:
  0        every rank ended with 0
  1..124   that of the first rank that failed
  2        also: wrong usage
  125      hvdrun itself failed, for instance because a host cannot be reached
  126, 127 the program cannot be run; is not there
  128+N    the first rank that failed, or hvdrun, was ended by signal N";

/// Makes of the usual spellings what the parser knows: `-np` and `-cb`, `--no-SWITCH`, `_` for `-`. Leaves out Horovod's flags that
/// change nothing, of which the `notes` tell. Puts `--` before the program, whose arguments are its own.
///
/// # Errors
/// What to do in the place of a flag of Horovod's that cannot be left out.
pub fn normalised(args: impl IntoIterator<Item = OsString>, notes: &mut Vec<String>) -> Result<Vec<OsString>, String> {
    let command = Args::command();
    let mut done: Vec<OsString> = Vec::new();
    let mut args = args.into_iter();
    done.extend(args.next());
    while let Some(arg) = args.next() {
        let text = arg.to_str().filter(|text| text.starts_with('-') && text.len() > 1).map(spelled_out);
        let Some(text) = text else {
            done.extend(["--".into(), arg]);
            break;
        };
        let (name, has_value) = text.split_once('=').map_or((text.as_str(), false), |(name, _)| (name, true));
        if let Some(flag) = horovod::find(name) {
            notes.push(flag.judge()?);
            args.by_ref().take(if has_value { 0 } else { flag.values }).for_each(drop);
            continue;
        }
        let is_end = text == "--";
        let (text, takes_value) = resolve(&command, &text);
        done.push(text.into());
        if is_end {
            break;
        }
        if takes_value {
            done.extend(args.next());
        }
    }
    done.extend(args);
    Ok(done)
}

/// Horovod's short names in full, and dashes within a long name.
fn spelled_out(arg: &str) -> String {
    let glued = arg.strip_prefix("-np").map(|number| number.strip_prefix('=').unwrap_or(number));
    match arg {
        "-np" => "--num-proc".into(),
        _ if glued.is_some_and(|number| number.parse::<usize>().is_ok()) => {
            format!("--num-proc={}", glued.unwrap_or_default())
        }
        "-cb" => "--check-build".into(),
        "-v" => "--version".into(),
        "--log-with-timestamp" => "--log-hide-timestamp=false".into(),
        "--log-without-timestamp" => "--log-hide-timestamp=true".into(),
        _ if arg.starts_with("--") => {
            let (name, value) = arg.split_at(arg.find('=').unwrap_or(arg.len()));
            format!("{}{value}", name.replace('_', "-"))
        }
        _ => arg.into(),
    }
}

/// The flag as the parser knows it, and whether the next argument is its value.
fn resolve(command: &clap::Command, flag: &str) -> (String, bool) {
    let long = |name: &str| {
        command.get_arguments().find(|arg| arg.get_long_and_visible_aliases().is_some_and(|all| all.contains(&name)))
    };
    let takes_value = |arg: &clap::Arg| {
        matches!(arg.get_action(), ArgAction::Set | ArgAction::Append) && !arg.is_require_equals_set()
    };
    if let Some(name) = flag.strip_prefix("--no-")
        && long(name).is_some_and(|arg| arg.is_require_equals_set())
        && long(&flag[2..]).is_none()
    {
        return (format!("--{name}=false"), false);
    }
    let found = match flag.strip_prefix("--") {
        Some(name) => long(name),
        None => command.get_arguments().find(|arg| flag.chars().nth(1) == arg.get_short() && flag.chars().count() == 2),
    };
    (flag.into(), found.is_some_and(takes_value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Args {
        Args::try_parse_from(normalised(args.iter().map(OsString::from), &mut Vec::new()).unwrap()).unwrap()
    }

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn horovods_spellings_are_understood() {
        let args =
            parse(&["hvdrun", "-np", "2", "--ssh_port", "22", "--no-autotune", "--stall-check", "a", "-np", "3"]);
        assert_eq!((args.options.num_proc, args.options.ssh_port), (Some(2), Some(22)));
        assert_eq!((args.options.autotune, args.options.stall_check), (Some(false), Some(true)));
        assert_eq!(args.command, ["a", "-np", "3"]);
    }

    #[test]
    fn the_arguments_of_the_program_are_left_alone() {
        for flags in [&["hvdrun", "-n", "2"][..], &["hvdrun", "-n2", "--"], &["hvdrun", "--hosts", "a:2", "--verbose"]]
        {
            let program = ["./p", "--no-autotune", "--a_b", "-np", "--", "-H"];
            assert_eq!(parse(&[flags, &program].concat()).command, program, "{flags:?}");
        }
    }

    #[test]
    fn unknown_flags_are_refused() {
        for flag in ["--no-such", "--no-hosts", "-z"] {
            let args = normalised(["hvdrun", flag, "p"].map(OsString::from), &mut Vec::new()).unwrap();
            assert!(Args::try_parse_from(args).is_err(), "{flag}");
        }
    }

    #[test]
    fn a_number_may_stick_to_np() {
        for flag in ["-np12", "-np=12", "-n12"] {
            assert_eq!(parse(&["hvdrun", flag, "p"]).options.num_proc, Some(12), "{flag}");
        }
        let args = normalised(["hvdrun", "-np2x", "p"].map(OsString::from), &mut Vec::new()).unwrap();
        assert!(Args::try_parse_from(args).is_err());
    }

    #[test]
    fn flags_of_horovod_without_a_counterpart_are_left_out_or_explained() {
        let mut notes = Vec::new();
        let line =
            "hvdrun -np 2 --cycle-time-ms 3.5 --num_nccl_streams=4 --gloo --no-torus-allreduce p --gloo --min-np 2";
        let args = normalised(line.split(' ').map(OsString::from), &mut notes).unwrap();
        let args = Args::try_parse_from(args).unwrap();
        assert_eq!(
            (args.options.num_proc, args.command),
            (Some(2), ["p", "--gloo", "--min-np", "2"].map(OsString::from).into())
        );
        assert_eq!(notes.len(), 4);
        assert!(notes[0].starts_with("--cycle-time-ms changes nothing: there is no cycle"), "{}", notes[0]);
        for (flag, hint) in
            [("--min-np", "-np"), ("--mpi-args=-x", "mpirun"), ("--host-discovery-script", "--hostfile")]
        {
            let error = normalised(["hvdrun", flag, "2", "p"].map(OsString::from), &mut notes).unwrap_err();
            assert!(error.contains(hint) && flag.starts_with(error.split(' ').next().unwrap()), "{error}");
        }
    }

    #[test]
    fn all_other_flags_of_horovod_are_known() {
        let switches = "--check-build --disable-cache --verbose --hierarchical-allreduce --no-hierarchical-allreduce --autotune \
            --no-autotune --timeline-mark-cycles --no-timeline-mark-cycles --stall-check --no-stall-check \
            --log-with-timestamp --log-without-timestamp --prefix-output-with-timestamp";
        let values = "--num-proc --start-timeout --ssh-port --fusion-threshold-mb --cache-capacity --autotune-warmup-samples \
            --autotune-steps-per-sample --autotune-bayes-opt-max-samples --stall-check-warning-time-seconds \
            --stall-check-shutdown-time-seconds --network-interfaces --output-filename --config-file --ssh-identity-file \
            --autotune-log-file --timeline-filename --thread-affinity --log-level --hosts";
        let switches = switches.split_whitespace().map(String::from);
        for flag in switches.chain(values.split_whitespace().map(|flag| format!("{flag}=1"))) {
            assert_eq!(parse(&["hvdrun", &flag, "p"]).command, ["p"], "{flag}");
        }
        assert_eq!(spelled_out("-v"), "--version");
    }
}
