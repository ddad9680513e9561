"""Names of the parts of benchmarks that have many."""

BBH = (
    "boolean_expressions causal_judgement date_understanding disambiguation_qa dyck_languages formal_fallacies "
    "geometric_shapes hyperbaton logical_deduction_five_objects logical_deduction_seven_objects "
    "logical_deduction_three_objects movie_recommendation multistep_arithmetic_two navigate object_counting "
    "penguins_in_a_table reasoning_about_colored_objects ruin_names salient_translation_error_detection snarks "
    "sports_understanding temporal_sequences tracking_shuffled_objects_five_objects "
    "tracking_shuffled_objects_seven_objects tracking_shuffled_objects_three_objects web_of_lies word_sorting"
).split()
"""Of BIG-Bench Hard."""

REASONING_GYM = (
    "ab advanced_geometry aiw arc_1d arc_agi base_conversion basic_arithmetic binary_alternation bitwise_arithmetic "
    "caesar_cipher calendar_arithmetic chain_sum circuit_logic coin_flip color_cube_rotation complex_arithmetic "
    "count_bits count_primes course_schedule cryptarithm decimal_arithmetic decimal_chain_sum dice emoji_mystery "
    "family_relationships figlet_font fraction_simplification gcd group_anagrams isomorphic_strings kakurasu "
    "knights_knaves largest_island lcm leg_counting letter_counting letter_jumble mahjong_puzzle manipulate_matrix "
    "maze mini_sudoku modulo_grid needle_haystack number_filtering number_format number_sorting palindrome_generation "
    "palindrome_partitioning path_star polynomial_equations power_function prime_factorization products quantum_lock "
    "ransom_note rearc rectangle_count rotate_matrix rotten_oranges self_reference sentence_reordering shortest_path "
    "simple_equations simple_geometry spell_backward string_manipulation string_splitting string_synthesis sudoku "
    "survo syllogism time_intervals tower_of_hanoi word_sequence_reversal word_sorting zebra_puzzles"
).split()
"""Of reasoning-gym.

Left out: tasks whose scorer executes the response (binary_matrix, countdown, intermediate_integration, n_queens,
polynomial_multiplication, puzzle24, simple_integration, spiral_matrix, string_insertion) or whose items execute code
(codeio); those without a stored answer, of which no test can show that a right one counts (boxnet, graph_color,
propositional_logic, rubiks_cube, rush_hour); one whose scorer takes anything for right (game_of_life_halting); those
that draw less than an item a second (bf, futoshiki, game_of_life, jugs, number_sequence, sokoban), fail when they draw
(tsumego) or at every level (knight_swap, pool_matrix, word_ladder); and those without levels (acre, composite,
gsm_symbolic, list_functions)."""
