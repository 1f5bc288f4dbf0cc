# bash completion for tsoctl: source it, or put it into /etc/bash_completion.d.
_tsoctl() {
	local typed=${COMP_LINE:0:COMP_POINT} found words cur cut
	read -ra words <<<"$typed"
	[[ $typed == *[[:space:]] ]] && words+=("")
	cur=${words[-1]}
	# bash replaces only what is behind the last of these.
	cut=${cur%"${cur##*[=:]}"}
	COMPREPLY=()
	while IFS=$'\t' read -r found _; do
		if [[ $found == ":files" ]]; then
			compopt -o default
			return
		fi
		COMPREPLY+=("${found#"$cut"}")
	done < <(tsoctl __complete "${words[@]:1}" 2>/dev/null)
}
complete -F _tsoctl tsoctl
